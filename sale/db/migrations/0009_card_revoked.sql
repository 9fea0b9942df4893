-- A revocation by a person stands over roster files (INV-9).

alter table card
    add column revoked boolean not null default false,
    add constraint card_revoked_is_cancelled check (not revoked or status = 'cancelled');
comment on column card.revoked is
    'Cancelled by a person: no roster file makes the card active again, only a person does.';

-- Revocations from before this column are in the audit log, which masks card numbers. A cancelled card
-- with the same last digits may be taken for a revoked one: it stays cancelled, the next import
-- names it if its file says otherwise, and `sale cards restore` takes it back.
update card set revoked = true
where status = 'cancelled' and repeat('*', length(card_no) - 4) || right(card_no, 4) in (
    select split_part(target, ' ', 2) from (
        select distinct on (target) target, action from audit_log
        where action in ('card.revoke', 'card.restore')
        order by target, id desc
    ) last
    where action = 'card.revoke');
