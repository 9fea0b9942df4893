-- What may not buy is read from the feed alone, one definition for the first load and the audit: the
-- last word on each card, in order of the cards.

drop index card_not_active;
drop index card_change_by_card;
create index card_change_by_card on card_change (card_no, rev desc);
