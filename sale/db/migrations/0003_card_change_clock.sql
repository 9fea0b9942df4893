-- The moment of a change is when it is made and not when its transaction began: an import of a large
-- roster takes seconds before it changes a card, and the audit must not call what was sold
-- meanwhile a sale to a revoked card (INV-9).

alter table card_change alter column at set default clock_timestamp();
