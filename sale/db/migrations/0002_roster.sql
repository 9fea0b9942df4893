-- The roster of cards, the feed of cards that may not buy, and operators' accounts.

create table card (
    card_no    text primary key constraint card_no_digits check (card_no ~ '^[0-9]{12,19}$'),
    name       text not null constraint card_name_length check (length(name) between 1 and 64),
    union_code text not null constraint card_union_form check (union_code ~ '^[a-z0-9-]{1,48}$'),
    phone      text not null constraint card_phone_length check (length(phone) <= 20),
    pin_mac    bytea null constraint card_pin_mac_length check (length(pin_mac) = 32),
    status     text not null
               constraint card_status_known check (status in ('active', 'suspended', 'cancelled')),
    updated_at timestamptz not null default now()
);
comment on table card is 'The roster: holders of the mutual-aid service card.';
comment on column card.card_no is 'As printed on the card. Never in a log or a URL.';
comment on column card.union_code is 'The holder''s union, a code of unions.toml.';
comment on column card.phone is 'As imported; empty where unknown.';
comment on column card.pin_mac is
    'HMAC-SHA256 of card number and PIN under a key that the database does not hold; null: no PIN.';
comment on column card.status is 'Only active cards buy (INV-9).';
comment on column card.updated_at is 'Last time that an import or an operator changed this row.';

-- `sale tokens` reads the first N cards of a status in order of their numbers.
create index card_by_status on card (status, card_no);
-- A Redis that knows no revoked cards yet reads those two in a hundred that may not buy.
create index card_not_active on card (card_no) where status <> 'active';

create table card_change (
    rev     bigint primary key constraint card_change_rev_positive check (rev > 0),
    card_no text not null,
    active  boolean not null,
    at      timestamptz not null default now()
);
comment on table card_change is
    'The feed from which running campaigns learn which cards may not buy (INV-9): one row each '
    'time that a card becomes active or ceases to be. Written by triggers on card alone.';
comment on column card_change.rev is
    'Numbered 1, 2, 3 … in the order of commits: who has read up to N never misses a lower one.';
comment on column card_change.active is 'Whether the card may buy from here on.';
create index card_change_by_card on card_change (card_no);

-- Numbers come from max + 1 under a lock held to the commit. A sequence would be quicker and wrong:
-- its numbers are given out before the commit, so a reader could pass a lower one that is not yet
-- visible and never come back for it.
create function card_change_append(cards text[], actives boolean[]) returns void
language plpgsql as $$
begin
    if coalesce(array_length(cards, 1), 0) = 0 then
        return;
    end if;
    perform pg_advisory_xact_lock(x'53414C450002'::bigint);
    insert into card_change (rev, card_no, active)
    select (select coalesce(max(rev), 0) from card_change) + changed.n,
           changed.card_no, changed.active
      from unnest(cards, actives) with ordinality as changed (card_no, active, n);
end
$$;
comment on function card_change_append is
    'Appends to the feed, in commit order. Needs READ COMMITTED: the number is read after the lock.';

create function card_feed() returns trigger
language plpgsql as $$
declare
    cards   text[];
    actives boolean[];
begin
    if tg_op = 'INSERT' then
        -- A new active card needs no row, unless the feed said once that it may not buy.
        select array_agg(n.card_no order by n.card_no),
               array_agg(n.status = 'active' order by n.card_no)
          into cards, actives
          from new_card n
         where n.status <> 'active'
            or exists (select from card_change c where c.card_no = n.card_no);
    elsif tg_op = 'UPDATE' then
        select array_agg(n.card_no order by n.card_no),
               array_agg(n.status = 'active' order by n.card_no)
          into cards, actives
          from new_card n
          join old_card o using (card_no)
         where (n.status = 'active') <> (o.status = 'active');
    else
        select array_agg(o.card_no order by o.card_no),
               array_agg(false order by o.card_no)
          into cards, actives
          from old_card o
         where o.status = 'active';
    end if;
    perform card_change_append(cards, actives);
    return null;
end
$$;
comment on function card_feed is
    'Statement trigger: whatever changes card, also a hand at psql, stands in the feed.';

create trigger card_feed_insert after insert on card
    referencing new table as new_card
    for each statement execute function card_feed();
create trigger card_feed_update after update on card
    referencing old table as old_card new table as new_card
    for each statement execute function card_feed();
create trigger card_feed_delete after delete on card
    referencing old table as old_card
    for each statement execute function card_feed();

create function card_no_is_fixed() returns trigger
language plpgsql as $$
begin
    raise exception 'a card''s number cannot change' using errcode = 'integrity_constraint_violation';
end
$$;
create trigger card_no_is_fixed before update of card_no on card
    for each row when (old.card_no <> new.card_no) execute function card_no_is_fixed();

create table operator (
    name       text primary key
               constraint operator_name_length check (length(name) between 1 and 64),
    role       text not null
               constraint operator_role_known
               check (role in ('admin', 'operator', 'clerk', 'auditor')),
    union_code text not null default 'district',
    token_hash bytea null unique constraint operator_token_hash_length check (length(token_hash) = 32),
    disabled   boolean not null default false,
    created_at timestamptz not null default now(),
    constraint operator_disabled_has_no_token check (not disabled or token_hash is null)
);
comment on table operator is 'Accounts of those who run campaigns, sell at counters, or audit.';
comment on column operator.union_code is 'The union for which the account acts; district: all of them.';
comment on column operator.token_hash is
    'SHA-256 of the bearer token (256 random bits, so no salt is needed); null: no token.';
comment on column operator.disabled is 'Accounts are never deleted: the audit log names them.';
