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
 where c.revoked and i.status <> 'cancelled'
 order by i.line
 limit $1;

-- name: count_incoming -- How many cards are new, and how many read differently from the roster.
-- The status of a card that a person has revoked is no difference: it is not taken.
select count(*) filter (where c.card_no is null) as added,
       count(*) filter (where c.card_no is not null
           and (c.name, c.union_code, c.phone, c.pin_mac, c.status)
               is distinct from (i.name, i.union_code, i.phone, i.pin_mac,
                                 case when c.revoked then c.status else i.status end)) as changed
  from incoming_card i
  left join card c using (card_no);

-- name: upsert_incoming -- Only what differs is written: a repeated import touches no row.
-- In order of the key, so that the indexes grow at one end and two imports lock alike.
insert into card as c (card_no, name, union_code, phone, pin_mac, status)
select i.card_no, i.name, i.union_code, i.phone, i.pin_mac, i.status
  from incoming_card i
  left join card o using (card_no)
 where o.card_no is null
    or (o.name, o.union_code, o.phone, o.pin_mac, o.status)
       is distinct from (i.name, i.union_code, i.phone, i.pin_mac,
                         case when o.revoked then o.status else i.status end)
 order by i.card_no
    on conflict (card_no) do update
   set name = excluded.name, union_code = excluded.union_code, phone = excluded.phone,
       pin_mac = excluded.pin_mac, updated_at = now(),
       -- The row as it is now, locked: a revocation that came meanwhile stands too.
       status = case when c.revoked then c.status else excluded.status end;

-- name: find_card -- One card by its number.
select card_no, name, union_code, phone, pin_mac is not null as has_pin, status, revoked, updated_at
  from card where card_no = $1;

-- name: lock_card -- Status of a card, and whether a person revoked it, held until the commit.
select status, revoked from card where card_no = $1 for update;

-- name: set_status -- A card's new status by a person's word; the triggers tell the feed.
update card set status = $2, revoked = $3, updated_at = now() where card_no = $1;

-- name: changes_since -- The feed after revision $1, oldest first.
select rev, card_no, active from card_change where rev > $1 order by rev limit $2;

-- name: current_rev -- The feed's last revision; 0 where it is empty.
select coalesce(max(rev), 0) from card_change;

-- name: inactive_cards -- Cards that may not buy at revision $3 (null: now), after $1, at most $2.
-- From the feed and not from card: it also tells of a card that was removed, and what it says of a
-- revision never changes.
select card_no from (
    select distinct on (card_no) card_no, active from card_change
     where card_no > $1 and ($3::bigint is null or rev <= $3) order by card_no, rev desc
) last where not active order by card_no limit $2;

-- name: cards_of_status -- The roster's first $2 cards of a status.
select card_no, union_code from card where status = $1 order by card_no limit $2;
