-- name: position -- How far a campaign's ledger is applied.
SELECT applied, chain FROM campaign WHERE campaign_id = $1;

-- name: positions -- How far each campaign's ledger is applied; not of rehearsals that are gone.
SELECT campaign_id, applied, chain FROM campaign WHERE purged_at IS NULL;

-- name: state -- A campaign's state as far as it is applied.
SELECT state FROM campaign WHERE campaign_id = $1;

-- name: living -- Campaigns that have events and are not deleted drafts.
SELECT campaign_id FROM campaign WHERE applied > 0 AND state <> 'deleted' ORDER BY campaign_id;

-- name: begin_campaign -- A campaign before its first event.
INSERT INTO campaign (campaign_id, chain) VALUES ($1, $2)
ON CONFLICT (campaign_id) DO NOTHING;

-- name: move_position -- The compare-and-set; no row means that another writer was here.
-- The two settings hold for this transaction: the commit waits for the disk, and no plan made
-- while the tables were small scans them when they are large.
UPDATE campaign SET applied = $4, chain = $5, epoch = $6, applied_at = $7
WHERE campaign_id = $1 AND applied = $2 AND chain = $3
RETURNING set_config('synchronous_commit', 'on', true), set_config('enable_seqscan', 'off', true);

-- name: post_sales -- Orders of the sales numbered $2 to $3.
-- Tried on two cores: copying the orders beside the events costs the client more than this join
-- costs the server.
INSERT INTO orders (
    campaign_id, seq, created_at, card_no, key_hash, showing_no, quantity, price_fen
)
SELECT campaign_id, seq, at, card_no, key_hash, showing_no, quantity, price_fen
FROM event
WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = 'sold';

-- name: post_audit -- What operators and the clock did, in the events numbered $2 to $3.
INSERT INTO audit_log (at, actor, action, target, campaign_id, reason, data)
SELECT at, coalesce(actor, 'engine'), 'campaign.' || kind, campaign_id, campaign_id, reason,
    coalesce(data, '{}') || jsonb_build_object('seq', seq)
FROM event
WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind NOT IN ('sold', 'voided')
ORDER BY seq;

-- name: forget_showings -- Makes room for a draft that is made anew.
DELETE FROM showing WHERE campaign_id = $1;

-- name: configure -- A campaign as it was created.
UPDATE campaign SET config = $2, state = 'draft', opens_at = $3, closes_at = $4,
    price_fen = $5, card_limit = $6
WHERE campaign_id = $1;

-- name: add_showings -- Showings of a campaign: numbers, IDs, titles, moments, tickets.
INSERT INTO showing (campaign_id, showing_no, showing_id, title, starts_at, stock)
SELECT $1, * FROM unnest($2::int[], $3::text[], $4::text[], $5::timestamptz[], $6::int[]);

-- name: add_stock -- More tickets of a showing.
UPDATE showing SET stock = stock + $3 WHERE campaign_id = $1 AND showing_no = $2
RETURNING stock;

-- name: change_state -- A new state, and a new window where one is given.
UPDATE campaign SET state = $2,
    opens_at = CASE WHEN $3 THEN $4 ELSE opens_at END,
    closes_at = CASE WHEN $5 THEN $6 ELSE closes_at END
WHERE campaign_id = $1;

-- name: record_conflict -- An event that the constraints refused to act on.
INSERT INTO conflict (campaign_id, seq, at, why, event) VALUES ($1, $2, $3, $4, $5);

-- name: conflicts_to_pause -- Campaigns with a conflict that have not been paused for it.
SELECT campaign_id, min(why) AS why FROM conflict
WHERE paused_at IS NULL GROUP BY campaign_id;

-- name: conflict_rows -- Rows of table conflict of each campaign, whatever their source.
SELECT campaign_id, count(*) AS refused FROM conflict GROUP BY campaign_id;

-- name: mark_paused -- The campaign has been paused for its conflicts.
UPDATE conflict SET paused_at = now() WHERE campaign_id = $1 AND paused_at IS NULL;

-- name: orders_of_card -- A page of a card's orders, newest first.
SELECT o.*, s.showing_id, coalesce(u.card_limit - u.live, 0) AS card_remaining
FROM orders o
JOIN showing s USING (campaign_id, showing_no)
LEFT JOIN card_use u ON u.campaign_id = o.campaign_id AND u.card_no = o.card_no
WHERE o.card_no = $1
    AND ($2::timestamptz IS NULL
        OR (o.created_at, o.campaign_id, o.seq) < ($2, $3::text COLLATE "C", $4::bigint))
ORDER BY o.created_at DESC, o.campaign_id DESC, o.seq DESC
LIMIT $5;

-- name: one_order -- One order.
SELECT o.*, s.showing_id, coalesce(u.card_limit - u.live, 0) AS card_remaining
FROM orders o
JOIN showing s USING (campaign_id, showing_no)
LEFT JOIN card_use u ON u.campaign_id = o.campaign_id AND u.card_no = o.card_no
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
-- The rule of Actor.may_see. Rows about no campaign (cards, accounts) are the district's.
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

-- name: draft_events -- What made, filled and ended the draft that event $2 was of.
WITH life AS (
    SELECT max(seq) AS made FROM event
    WHERE campaign_id = $1 AND kind = 'created' AND seq <= $2
)
SELECT seq, at, epoch, kind, data
FROM event, life
WHERE campaign_id = $1 AND kind IN ('created', 'stock_added', 'deleted')
    AND seq BETWEEN life.made AND (
        SELECT min(seq) FROM event WHERE campaign_id = $1 AND kind = 'deleted' AND seq > life.made)
ORDER BY seq;

-- name: campaigns -- Every campaign that has events, as far as it is applied, with its showings.
SELECT campaign_id, config, state, opens_at, closes_at, price_fen, card_limit, epoch, applied, chain,
    coalesce((
        SELECT jsonb_agg(jsonb_build_object(
            'showing_no', showing_no, 'showing_id', showing_id, 'title', title,
            'starts_at_ms', (extract(epoch FROM starts_at) * 1000)::bigint,
            'stock', stock, 'live', live
        ) ORDER BY showing_no)
        FROM showing WHERE showing.campaign_id = campaign.campaign_id
    ), '[]') AS showings
FROM campaign
WHERE applied > 0
ORDER BY campaign_id;
