-- name: create_incoming -- Where a file's lines wait until all of them are known to be good.
create temporary table incoming_card (
    line       bigint not null,
    card_no    text not null,
    name       text not null,
    union_code text not null,
    phone      text not null,
    pin_mac    bytea null,
    status     text not null,
    looks      smallint not null
) on commit drop;

-- name: analyze_incoming -- Without figures the planner takes nested loops for the joins below.
analyze incoming_card;

-- name: twice -- Lines whose card stands on an earlier line too: the first $1, and how many.
with twice as (
    select card_no, min(line) as first_line
      from incoming_card group by card_no having count(*) > 1
)
select i.line, t.first_line, count(*) over () as total
  from incoming_card i
  join twice t using (card_no)
 where i.line > t.first_line
 order by i.line
 limit $1;

-- name: lock_import -- One import at a time; two that wrote the same cards would deadlock.
select pg_advisory_xact_lock(x'53414C450003'::bigint);

-- name: new_numbers -- Of the cards that the roster lacks: how many of each length, of each look.
select length(i.card_no) as digits, i.looks, count(*) as cards
  from incoming_card i
  left join card c using (card_no)
 where c.card_no is null and length(i.card_no) > 15
 group by 1, 2;

-- name: new_of_look -- Lines of new cards of $1 digits that look like $2: the first $3, how many.
select i.line, i.card_no, count(*) over () as total
  from incoming_card i
  left join card c using (card_no)
 where c.card_no is null and length(i.card_no) = $1 and i.looks = $2
 order by i.line
 limit $3;

-- name: zeros_lost -- Lines of new cards whose number is another one without its leading zeros.
with longer as (
    select ltrim(card_no, '0') as rest from card where card_no >= '0' and card_no < '1'
     union
    select ltrim(card_no, '0') from incoming_card where card_no >= '0' and card_no < '1'
)
select i.line, i.card_no, count(*) over () as total
  from longer l
  join incoming_card i on i.card_no = l.rest
  left join card c on c.card_no = i.card_no
 where c.card_no is null
 order by i.line
 limit $1;

-- name: kept_revoked -- Lines that would make active or suspended what a person has revoked.
select i.line, i.card_no, i.status, count(*) over () as total
  from incoming_card i
  join card c using (card_no)
  join member m using (member_no)
 where m.revoked and c.replaced_at is null and i.status <> 'cancelled'
 order by i.line
 limit $1;

-- name: replaced -- Lines whose card was replaced by another: they are not taken.
select i.line, i.card_no, count(*) over () as total
  from incoming_card i
  join card c using (card_no)
 where c.replaced_at is not null
 order by i.line
 limit $1;

-- name: count_incoming -- How many cards are new, and how many members read differently.
-- The status of a member whom a person has revoked is no difference: it is not taken.
select count(*) filter (where c.card_no is null) as added,
       count(*) filter (where c.replaced_at is null and m.member_no is not null
           and (m.name, m.union_code, m.phone, m.pin_mac, m.status)
               is distinct from (i.name, i.union_code, i.phone, i.pin_mac,
                                 case when m.revoked then m.status else i.status end)) as changed
  from incoming_card i
  left join card c using (card_no)
  left join member m using (member_no);

-- name: change_members -- Only what differs is written: a repeated import touches no row.
update member m
   set name = i.name, union_code = i.union_code, phone = i.phone, pin_mac = i.pin_mac,
       updated_at = now(),
       -- The row as it is now, locked: a revocation that came meanwhile stands too.
       status = case when m.revoked then m.status else i.status end
  from incoming_card i
  join card c using (card_no)
 where m.member_no = c.member_no and c.replaced_at is null
   and (m.name, m.union_code, m.phone, m.pin_mac, m.status)
       is distinct from (i.name, i.union_code, i.phone, i.pin_mac,
                         case when m.revoked then m.status else i.status end);

-- name: add_members -- New cards get new members, numbered in the order of the cards.
-- In the order of the keys, so that both indexes grow at their ends.
with fresh as materialized (
    select i.*, (select coalesce(max(member_no), 0) from member)
                + row_number() over (order by i.card_no) as member_no
      from incoming_card i
      left join card c using (card_no)
     where c.card_no is null
), made as (
    insert into member (member_no, name, union_code, phone, pin_mac, status)
    select member_no, name, union_code, phone, pin_mac, status from fresh order by member_no
)
insert into card (card_no, member_no) select card_no, member_no from fresh order by member_no;

-- name: find_card -- One card by its number, with the member's card in use.
select m.member_no, m.name, m.union_code, m.phone, m.pin_mac is not null as has_pin, m.status,
       m.revoked, m.generation, m.updated_at, c.card_no,
       case when c.replaced_at is not null then used.card_no end as replaced_by
  from card c
  join member m using (member_no)
  join card used on used.member_no = c.member_no and used.replaced_at is null
 where c.card_no = $1;

-- name: lock_member -- The member of a card, held until the commit.
select m.member_no, m.status, m.revoked, c.replaced_at is not null as replaced
  from card c join member m using (member_no)
 where c.card_no = $1 for update;

-- name: set_status -- A member's new status by a person's word; the triggers tell the feed.
-- A revocation ends the tokens that were given out.
update member
   set status = $2, revoked = $3, updated_at = now(),
       generation = generation + ($3 and not revoked)::integer
 where member_no = $1;

-- name: replace_card -- The card is in use no longer.
update card set replaced_at = now() where card_no = $1;

-- name: add_card -- The member's new card; no row where the number is in the roster already.
insert into card (card_no, member_no) values ($1, $2)
    on conflict (card_no) do nothing
returning card_no;

-- name: end_tokens -- The tokens that a member was given are valid no longer.
update member set generation = generation + 1, updated_at = now() where member_no = $1;

-- name: changes_since -- The feed after revision $1, oldest first.
select rev, member_no, active from member_change where rev > $1 order by rev limit $2;

-- name: current_rev -- The feed's last revision; 0 where it is empty.
select coalesce(max(rev), 0) from member_change;

-- name: generations_from -- Rises of generations from revision $1 on, oldest first, at most $2.
select rev, member_no, generation from member_change
 where raised and rev >= $1 order by rev limit $2;

-- name: inactive_members -- Members who may not buy at revision $3 (null: now), after $1, at most $2.
-- From the feed and not from member: what it says of a revision never changes.
select member_no from (
    select distinct on (member_no) member_no, active from member_change
     where member_no > $1 and ($3::bigint is null or rev <= $3) order by member_no, rev desc
) last where not active order by member_no limit $2;

-- name: members_of_status -- The roster's first $2 members of a status, with their cards.
select c.card_no, m.member_no, m.union_code, m.generation
  from member m join card c on c.member_no = m.member_no and c.replaced_at is null
 where m.status = $1 order by m.member_no limit $2;
