-- name: begin_campaign -- A campaign before its first event.
INSERT INTO campaign (campaign_id, chain) VALUES ($1, $2)
ON CONFLICT (campaign_id) DO NOTHING;

-- name: move_position -- The compare-and-set; no row means that another writer was here.
-- The two settings hold for this transaction: the commit waits for the disk, and no plan made
-- while the tables were small scans them when they are large.
UPDATE campaign SET applied = $4, chain = $5, epoch = $6, applied_at = $7
WHERE campaign_id = $1 AND applied = $2 AND chain = $3
RETURNING set_config('synchronous_commit', 'on', true), set_config('enable_seqscan', 'off', true);

-- Statements that apply a run of events of one kind (ledger/kinds.py) get the campaign, the first and
-- the last number of the run, and the kind. Events of kinds that do nothing may stand between.

-- name: add_orders -- Orders of a run of sales.
-- Tried on two cores: copying the orders beside the events costs the client more than this join
-- costs the server.
INSERT INTO orders (
    campaign_id, seq, created_at, member_no, key_hash, showing_no, quantity, price_fen
)
SELECT campaign_id, seq, at, member_no, key_hash, showing_no, quantity, price_fen
FROM event
WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4;

-- name: remove_showings -- Makes room for a draft that is made anew.
DELETE FROM showing WHERE campaign_id = $1 AND EXISTS (
    SELECT FROM event WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4);

-- name: configure -- A campaign as it was created last.
UPDATE campaign SET config = made.data -> 'config', state = 'draft',
    opens_at = moment(made.data -> 'opens_at'), closes_at = moment(made.data -> 'closes_at'),
    price_fen = (made.data -> 'config' ->> 'price_fen')::integer,
    card_limit = (made.data -> 'config' ->> 'card_limit')::integer
FROM (
    SELECT data FROM event WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4
    ORDER BY seq DESC LIMIT 1
) made
WHERE campaign_id = $1;

-- name: add_showings -- Showings of a campaign as it was created last.
INSERT INTO showing (campaign_id, showing_no, showing_id, title, starts_at, stock)
SELECT $1, row.number - 1, row.showing ->> 'id', row.showing ->> 'title',
    (row.showing ->> 'starts_at')::timestamptz, (row.showing ->> 'tickets')::integer
FROM (
    SELECT data FROM event WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4
    ORDER BY seq DESC LIMIT 1
) made, jsonb_array_elements(made.data -> 'config' -> 'showings')
    WITH ORDINALITY AS row (showing, number);

-- name: add_stock -- More tickets of showings; refused where there is no such showing.
WITH added AS (
    SELECT (data ->> 'showing')::integer AS showing_no, sum((data ->> 'add')::integer) AS tickets
    FROM event WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4 GROUP BY 1
), changed AS (
    UPDATE showing SET stock = stock + added.tickets FROM added
    WHERE campaign_id = $1 AND showing.showing_no = added.showing_no
    RETURNING showing.showing_no
)
SELECT refuse('no showing ' || showing_no) FROM added
WHERE showing_no NOT IN (SELECT showing_no FROM changed);

-- name: change_state -- The state $5, and the window that was given last.
WITH given AS (
    SELECT seq, data FROM event
    WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4
)
UPDATE campaign SET state = $5,
    opens_at = CASE WHEN EXISTS (SELECT FROM given WHERE data ? 'opens_at') THEN (
        SELECT moment(data -> 'opens_at') FROM given WHERE data ? 'opens_at'
        ORDER BY seq DESC LIMIT 1) ELSE opens_at END,
    closes_at = CASE WHEN EXISTS (SELECT FROM given WHERE data ? 'closes_at') THEN (
        SELECT moment(data -> 'closes_at') FROM given WHERE data ? 'closes_at'
        ORDER BY seq DESC LIMIT 1) ELSE closes_at END
WHERE campaign_id = $1;

-- name: add_audit_rows -- What people did, in the events numbered $2 to $3: kinds $4, not by $5.
INSERT INTO audit_log (at, actor, action, target, campaign_id, reason, data)
SELECT at, coalesce(actor, 'engine'), 'campaign.' || kind, campaign_id, campaign_id, reason,
    coalesce(data, '{}') || jsonb_build_object('seq', seq)
FROM event
WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = ANY ($4)
    AND actor IS DISTINCT FROM $5
ORDER BY seq;

-- name: record_conflict -- An event that the constraints refused to act on.
INSERT INTO conflict (campaign_id, seq, at, why, event) VALUES ($1, $2, $3, $4, $5);

-- name: conflicts_to_pause -- Campaigns with a conflict that have not been paused for it.
SELECT campaign_id, min(why) AS why FROM conflict
WHERE paused_at IS NULL GROUP BY campaign_id;

-- name: conflict_rows -- Rows of table conflict of each campaign, whatever their source.
SELECT campaign_id, count(*) AS refused FROM conflict GROUP BY campaign_id;

-- name: mark_paused -- The campaign has been paused for its conflicts.
UPDATE conflict SET paused_at = now() WHERE campaign_id = $1 AND paused_at IS NULL;
