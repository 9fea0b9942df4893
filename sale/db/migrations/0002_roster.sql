-- The roster: members have numbers, and card numbers lead to them. Everything else in the engine
-- knows members by number alone, so a lost card is replaced by one row, and no card number is in the
-- ledger, in Redis, in a token or in a log.

create table member (
    member_no  integer primary key
               constraint member_no_range check (member_no between 1 and 100000000),
    name       text not null constraint member_name_length check (length(name) between 1 and 64),
    union_code text not null constraint member_union_form check (union_code ~ '^[a-z0-9-]{1,48}$'),
    phone      text not null constraint member_phone_length check (length(phone) <= 20),
    pin_mac    bytea null constraint member_pin_mac_length check (length(pin_mac) = 32),
    status     text not null
               constraint member_status_known check (status in ('active', 'suspended', 'cancelled')),
    revoked    boolean not null default false,
    generation integer not null default 0 constraint member_generation_range check (generation >= 0),
    updated_at timestamptz not null default now(),
    constraint member_revoked_is_cancelled check (not revoked or status = 'cancelled')
);
comment on table member is 'The roster: holders of the mutual-aid service card.';
comment on column member.member_no is
    'Given by the first import that names the card: 1, 2, 3 … without gaps, never used again. '
    'Numbers from 2,000,000,000 on are made up by rehearsals and stand in no roster.';
comment on column member.name is 'As imported.';
comment on column member.union_code is 'The member''s union, a code of unions.toml.';
comment on column member.phone is 'As imported; empty where unknown.';
comment on column member.pin_mac is
    'HMAC-SHA256 of the PIN and the card number in the roster file that gave it, under a key that the '
    'database does not hold; null: no PIN. A PIN outlives its card: it is compared with each card '
    'number of the member.';
comment on column member.status is 'Only active members buy (INV-9).';
comment on column member.revoked is
    'Cancelled by a person: no roster file makes the member active again, only a person does.';
comment on column member.generation is
    'Tokens carry it, and one below it is valid no longer. Replacing and revoking a card raise it.';
comment on column member.updated_at is 'Last time that an import or an operator changed this row.';

create table card (
    card_no     text collate "C" primary key
                constraint card_no_digits check (card_no ~ '^[0-9]{12,19}$'),
    member_no   integer not null references member,
    replaced_at timestamptz null
);
comment on table card is
    'Card numbers, and whose they are. No other table holds one, nor a log, nor a URL.';
comment on column card.card_no is 'As printed on the card.';
comment on column card.member_no is 'The member who holds it, or held it.';
comment on column card.replaced_at is
    'When the member got another card in its place; null: it is in use. A replaced number stays, so '
    'that a roster file that still holds it makes no second member.';

create unique index card_in_use on card (member_no) where replaced_at is null;
comment on index card_in_use is 'A member has one card at a time.';

create trigger member_stays before delete or truncate on member
    execute function refuse_change('a member is never removed: its number stands in the ledger');
create trigger member_no_is_fixed before update of member_no on member
    for each row when (old.member_no <> new.member_no)
    execute function refuse_change('a member''s number cannot change');
create trigger member_generation_only_rises before update of generation on member
    for each row when (new.generation < old.generation)
    execute function refuse_change('a generation only rises: tokens that have ended would be valid again');
create trigger card_stays before delete or truncate on card
    execute function refuse_change('a card number is never removed: replace the card');
create trigger card_is_fixed before update on card
    for each row when (old.card_no <> new.card_no or old.member_no <> new.member_no
                       or (old.replaced_at is not null and new.replaced_at is null))
    execute function refuse_change('a card''s number and its member cannot change');

-- The feed of changes ------------------------------------------------------------------------------

create table member_change (
    rev        bigint primary key constraint member_change_rev_positive check (rev > 0),
    member_no  integer not null,
    active     boolean not null,
    generation integer not null,
    raised     boolean not null,
    -- When the change is made, not when its transaction began: an import takes seconds before it
    -- changes a member, and what was sold meanwhile is no sale to a member who may not buy (INV-9).
    at         timestamptz not null default clock_timestamp()
);
comment on table member_change is
    'The feed from which running campaigns and API processes learn who may not buy (INV-9) and which '
    'tokens have ended: one row each time that a member becomes active or ceases to be, or that the '
    'generation rises. Written by triggers on member alone.';
comment on column member_change.rev is
    'Numbered 1, 2, 3 … in the order of commits: a reader that has read up to N misses no lower one.';
comment on column member_change.member_no is 'The member.';
comment on column member_change.active is 'Whether the member may buy from here on.';
comment on column member_change.generation is 'The member''s generation from here on.';
comment on column member_change.raised is 'Whether this change raised the generation.';
comment on column member_change.at is 'When it was made; up to some time before its commit.';
create index member_change_by_member on member_change (member_no, rev desc);
create index member_change_raised on member_change (rev) where raised;

-- Numbers come from max + 1 under a lock held to the commit. A sequence would be quicker and wrong:
-- its numbers are given out before the commit, so a reader could pass a lower one that is not yet
-- visible and never come back for it.
create function member_feed() returns trigger
language plpgsql as $$
declare
    members integer[];
begin
    if tg_op = 'INSERT' then
        members := array(
            select n.member_no from new_member n
             where n.status <> 'active' or n.generation > 0 order by n.member_no);
    else
        members := array(
            select n.member_no from new_member n join old_member o using (member_no)
             where (n.status = 'active') <> (o.status = 'active') or n.generation > o.generation
             order by n.member_no);
    end if;
    if cardinality(members) = 0 then
        return null;
    end if;
    perform pg_advisory_xact_lock(x'53414C450002'::bigint);
    if tg_op = 'INSERT' then
        insert into member_change (rev, member_no, active, generation, raised)
        select (select coalesce(max(rev), 0) from member_change) + changed.position,
               n.member_no, n.status = 'active', n.generation, n.generation > 0
          from unnest(members) with ordinality as changed (member_no, position)
          join new_member n using (member_no);
    else
        insert into member_change (rev, member_no, active, generation, raised)
        select (select coalesce(max(rev), 0) from member_change) + changed.position,
               n.member_no, n.status = 'active', n.generation, n.generation > o.generation
          from unnest(members) with ordinality as changed (member_no, position)
          join new_member n using (member_no)
          join old_member o using (member_no);
    end if;
    return null;
end
$$;
comment on function member_feed is
    'Statement trigger: whatever changes member, also a person at psql, is in the feed, in the order '
    'of commits. Needs READ COMMITTED: the number is read after the lock.';

create trigger member_feed_insert after insert on member
    referencing new table as new_member
    for each statement execute function member_feed();
create trigger member_feed_update after update on member
    referencing old table as old_member new table as new_member
    for each statement execute function member_feed();

create table member_union_change (
    member_no    integer not null,
    union_before text not null,
    at           timestamptz not null default clock_timestamp()
);
comment on table member_union_change is
    'From which union a member has moved, and when. A token names the union of the moment it was '
    'issued and lasts for thirty days, so until then the member may buy in the former union''s '
    'campaigns, and the audit must tell such a sale from one that nothing explains (INV-9).';
comment on column member_union_change.member_no is 'The member.';
comment on column member_union_change.union_before is 'The union before the move.';
comment on column member_union_change.at is 'When the member moved.';
create index member_union_change_by_member on member_union_change (member_no);

create function member_union_moved() returns trigger
language plpgsql as $$
begin
    insert into member_union_change (member_no, union_before)
    select o.member_no, o.union_code from old_member o join new_member n using (member_no)
     where n.union_code <> o.union_code;
    return null;
end
$$;
comment on function member_union_moved is
    'Statement trigger: each move is noted, by an import or by a person at psql.';

create trigger member_union_update after update on member
    referencing old table as old_member new table as new_member
    for each statement execute function member_union_moved();
