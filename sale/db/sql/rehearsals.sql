-- name: left_over -- Rehearsals that have anything left, oldest first.
SELECT campaign_id, rehearsal_of, state, applied, purged_at IS NOT NULL AS struck_off
FROM campaign c
WHERE rehearsal_of <> '' AND (
    purged_at IS NULL
    OR EXISTS (SELECT FROM event e WHERE e.campaign_id = c.campaign_id)
    OR EXISTS (SELECT FROM orders o WHERE o.campaign_id = c.campaign_id)
    OR EXISTS (SELECT FROM ticket t WHERE t.campaign_id = c.campaign_id)
    OR EXISTS (SELECT FROM member_use u WHERE u.campaign_id = c.campaign_id)
    OR EXISTS (SELECT FROM showing s WHERE s.campaign_id = c.campaign_id))
ORDER BY campaign_id;

-- name: real -- Campaigns that are no rehearsals, as far as their ledger is applied.
SELECT campaign_id FROM campaign WHERE rehearsal_of = '' AND applied > 0;

-- name: purged -- Whether a campaign was a rehearsal that was struck off.
SELECT EXISTS (SELECT FROM campaign WHERE campaign_id = $1 AND purged_at IS NOT NULL);

-- name: sold -- Orders of a campaign, and the tickets in them.
SELECT count(*) AS orders, coalesce(sum(quantity), 0)::bigint AS tickets
FROM orders WHERE campaign_id = $1;

-- name: strike_off -- Strikes a rehearsal off, at the position that was looked at.
UPDATE campaign SET state = 'deleted', purged_at = now()
WHERE campaign_id = $1 AND applied = $2 AND rehearsal_of <> '' AND purged_at IS NULL
RETURNING rehearsal_of, chain;

-- name: log -- Who did it and why; the chain hash stays as a fingerprint of what is gone.
INSERT INTO audit_log (actor, action, target, campaign_id, reason, data)
VALUES ($1, 'rehearsal.purged', $2, $2, $3, $4);

-- name: remove_conflict -- Conflicts of a rehearsal.
DELETE FROM conflict WHERE campaign_id = $1;

-- name: remove_handed_in -- What API processes have handed in for a rehearsal.
DELETE FROM handed_in WHERE campaign_id = $1;

-- name: remove_showing -- Showings of a rehearsal.
DELETE FROM showing WHERE campaign_id = $1;

-- name: remove_ticket -- At most $2 tickets of a rehearsal.
DELETE FROM ticket WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM ticket WHERE campaign_id = $1 LIMIT $2));

-- name: remove_orders -- At most $2 orders of a rehearsal.
DELETE FROM orders WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM orders WHERE campaign_id = $1 LIMIT $2));

-- name: remove_member_use -- At most $2 counters of a rehearsal's members.
DELETE FROM member_use WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM member_use WHERE campaign_id = $1 LIMIT $2));

-- name: remove_event -- At most $2 events of a rehearsal.
DELETE FROM event WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM event WHERE campaign_id = $1 LIMIT $2));
