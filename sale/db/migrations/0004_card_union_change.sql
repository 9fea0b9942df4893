-- A token names the union of the moment it was issued and lasts for thirty days, so a card that has
-- moved to another union may buy in the old one's campaigns until then. The audit must tell such a
-- sale from one that nothing explains (INV-9).

create table card_union_change (
    card_no      text not null,
    union_before text not null,
    at           timestamptz not null default clock_timestamp()
);
comment on table card_union_change is
    'From which union a card has moved, and when. Written by a trigger on card alone.';
create index card_union_change_by_card on card_union_change (card_no);

create function card_union_moved() returns trigger
language plpgsql as $$
begin
    insert into card_union_change (card_no, union_before)
    select o.card_no, o.union_code from old_card o join new_card n using (card_no)
     where n.union_code <> o.union_code;
    return null;
end
$$;
comment on function card_union_moved is
    'Statement trigger: whatever moves a card, an import or a hand at psql, is noted.';

create trigger card_union_update after update on card
    referencing old table as old_card new table as new_card
    for each statement execute function card_union_moved();
