-- name: position -- How far a campaign's ledger is applied.
SELECT applied, chain FROM campaign WHERE campaign_id = $1;

-- name: positions -- How far each campaign's ledger is applied; not of rehearsals that are gone.
SELECT campaign_id, applied, chain FROM campaign WHERE purged_at IS NULL;

-- name: state -- A campaign's state as far as it is applied.
SELECT state FROM campaign WHERE campaign_id = $1;

-- name: living -- Campaigns that have events and are not deleted drafts.
SELECT campaign_id FROM campaign WHERE applied > 0 AND state <> 'deleted' ORDER BY campaign_id;

-- name: events -- The ledger after number $2, at most $3 events.
SELECT seq, at, epoch, kind, member_no, showing_no, quantity, key_hash, price_fen, pay_before,
    order_seq, data
FROM event WHERE campaign_id = $1 AND seq > $2 ORDER BY seq LIMIT $3;

-- name: orders_of_member -- A page of a member's orders, newest first.
SELECT o.*, s.showing_id, coalesce(u.card_limit - u.live, 0) AS card_remaining,
    c.config ->> 'payment' AS payment, c.config ->> 'cancel_until' AS cancel_until,
    ARRAY(SELECT t.no FROM ticket t WHERE t.campaign_id = o.campaign_id AND t.seq = o.seq
        AND t.state = 'cancelled') AS given_back
FROM orders o
JOIN showing s USING (campaign_id, showing_no)
JOIN campaign c USING (campaign_id)
LEFT JOIN member_use u ON u.campaign_id = o.campaign_id AND u.member_no = o.member_no
WHERE o.member_no = $1
    AND ($2::timestamptz IS NULL
        OR (o.created_at, o.campaign_id, o.seq) < ($2, $3::text COLLATE "C", $4::bigint))
ORDER BY o.created_at DESC, o.campaign_id DESC, o.seq DESC
LIMIT $5;

-- name: one_order -- One order.
SELECT o.*, s.showing_id, coalesce(u.card_limit - u.live, 0) AS card_remaining,
    c.config ->> 'payment' AS payment, c.config ->> 'cancel_until' AS cancel_until,
    ARRAY(SELECT t.no FROM ticket t WHERE t.campaign_id = o.campaign_id AND t.seq = o.seq
        AND t.state = 'cancelled') AS given_back
FROM orders o
JOIN showing s USING (campaign_id, showing_no)
JOIN campaign c USING (campaign_id)
LEFT JOIN member_use u ON u.campaign_id = o.campaign_id AND u.member_no = o.member_no
WHERE o.campaign_id = $1 AND o.seq = $2;

-- name: audit_log -- A page of the audit log, newest first.
SELECT id, at, actor, action, target, campaign_id, reason, data
FROM audit_log
WHERE $1::bigint IS NULL OR id < $1
ORDER BY id DESC
LIMIT $2;

-- name: audit_log_of_campaign -- The same, of one campaign.
SELECT id, at, actor, action, target, campaign_id, reason, data
FROM audit_log
WHERE campaign_id = $3 AND ($1::bigint IS NULL OR id < $1)
ORDER BY id DESC
LIMIT $2;

-- name: audit_log_of_union -- The same, as accounts of a union may see it.
-- The rule of Actor.may_see. Rows about no campaign (members, accounts) are the district's.
SELECT id, at, actor, action, target, campaign_id, reason, data
FROM audit_log_owned
WHERE (owner = $3 OR published) AND ($1::bigint IS NULL OR id < $1)
ORDER BY id DESC
LIMIT $2;

-- name: audit_log_of_union_and_campaign -- The same, of one campaign.
SELECT id, at, actor, action, target, campaign_id, reason, data
FROM audit_log_owned
WHERE campaign_id = $4 AND (owner = $3 OR published) AND ($1::bigint IS NULL OR id < $1)
ORDER BY id DESC
LIMIT $2;

-- name: draft_events -- All events of the draft that event $2 was of; none where it has not ended.
WITH life AS (
    SELECT max(seq) AS made FROM event
    WHERE campaign_id = $1 AND kind = 'created' AND seq <= $2
)
SELECT seq, at, epoch, kind, member_no, showing_no, quantity, key_hash, price_fen, pay_before,
    order_seq, data
FROM event, life
WHERE campaign_id = $1 AND seq BETWEEN life.made AND (
    SELECT min(seq) FROM event WHERE campaign_id = $1 AND kind = 'deleted' AND seq > life.made)
ORDER BY seq;

-- name: campaigns -- Every campaign that has events, as far as it is applied, with its showings.
SELECT campaign_id, config, state, opens_at, closes_at, price_fen, card_limit, epoch, applied, chain,
    coalesce((
        SELECT jsonb_agg(jsonb_build_object(
            'showing_no', showing_no, 'showing_id', showing_id, 'title', title,
            'stock', stock, 'live', live
        ) ORDER BY showing_no)
        FROM showing WHERE showing.campaign_id = campaign.campaign_id
    ), '[]') AS showings
FROM campaign
WHERE applied > 0
ORDER BY campaign_id;
