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

-- name: add_orders -- Orders of a run of sales or holds.
-- Tried on two cores: copying the orders beside the events costs the client more than this join
-- costs the server.
INSERT INTO orders (
    campaign_id, seq, created_at, member_no, key_hash, showing_no, quantity, price_fen, live, state,
    pay_before
)
SELECT campaign_id, seq, at, member_no, key_hash, showing_no, quantity, price_fen, quantity,
    CASE WHEN pay_before IS NULL THEN 'confirmed' ELSE 'held' END, pay_before
FROM event
WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4;

-- name: expire_orders -- Ends the holds of a run of expiries.
WITH changed AS (
    UPDATE orders o SET state = 'expired', live = 0, changed_by = e.seq
    FROM event e
    WHERE e.campaign_id = $1 AND e.seq BETWEEN $2 AND $3 AND e.kind = $4
        AND o.campaign_id = $1 AND o.seq = e.order_seq
    RETURNING e.seq
)
SELECT refuse('an order expired that is not there') FROM event
WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4
    AND seq NOT IN (SELECT seq FROM changed);

-- name: pay_orders -- What a run of payments did to their orders; each order is paid once.
WITH changed AS (
    UPDATE orders o SET paid = true, changed_by = e.seq,
        returned = e.data ->> 'outcome' = 'returned',
        state = CASE WHEN e.data ->> 'outcome' = 'returned' THEN o.state ELSE 'confirmed' END,
        live = CASE WHEN e.data ->> 'outcome' = 'returned' THEN o.live ELSE o.quantity END
    FROM event e
    WHERE e.campaign_id = $1 AND e.seq BETWEEN $2 AND $3 AND e.kind = $4
        AND o.campaign_id = $1 AND o.seq = e.order_seq
    RETURNING e.seq
)
SELECT refuse('an order was paid that is not there') FROM event
WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4
    AND seq NOT IN (SELECT seq FROM changed);

-- name: settle_payments -- What the ledger decided about the money of a run of payments.
UPDATE payment p SET outcome = e.data ->> 'outcome', event_seq = e.seq, trouble = ''
FROM event e
WHERE e.campaign_id = $1 AND e.seq BETWEEN $2 AND $3 AND e.kind = $4
    AND p.campaign_id = $1 AND p.order_seq = e.order_seq;

-- name: return_payments -- Money that came in for orders that had ended goes back.
INSERT INTO refund (refund_no, payment_no, campaign_id, event_seq, amount_fen)
SELECT p.payment_no || '-' || e.seq, p.payment_no, $1, e.seq, p.amount_fen
FROM event e JOIN payment p ON p.campaign_id = $1 AND p.order_seq = e.order_seq
WHERE e.campaign_id = $1 AND e.seq BETWEEN $2 AND $3 AND e.kind = $4
    AND e.data ->> 'outcome' = 'returned';

-- name: refund_tickets -- Money of paid tickets that were given back goes back.
INSERT INTO refund (refund_no, payment_no, campaign_id, event_seq, amount_fen)
SELECT p.payment_no || '-' || e.seq, p.payment_no, $1, e.seq, (e.data ->> 'refund_fen')::bigint
FROM event e JOIN payment p ON p.campaign_id = $1 AND p.order_seq = e.order_seq
WHERE e.campaign_id = $1 AND e.seq BETWEEN $2 AND $3 AND e.kind = $4
    AND (e.data ->> 'refund_fen')::bigint > 0;

-- name: hurry_payments -- The keeper closes open payments of orders that have ended.
UPDATE payment p SET next_at = now()
FROM event e
WHERE e.campaign_id = $1 AND e.seq BETWEEN $2 AND $3 AND e.kind = $4
    AND p.campaign_id = $1 AND p.order_seq = e.order_seq AND p.state = 'open';

-- name: cancel_tickets -- The tickets that a run of cancellations gives back; refused where one was before.
INSERT INTO ticket (campaign_id, seq, no, state, changed_by)
SELECT $1, e.order_seq, given.no::integer, 'cancelled', e.seq
FROM event e, jsonb_array_elements_text(e.data -> 'tickets') AS given (no)
WHERE e.campaign_id = $1 AND e.seq BETWEEN $2 AND $3 AND e.kind = $4;

-- name: cancel_orders -- The orders of these tickets. An order may be cancelled in part several times.
WITH given AS (
    SELECT order_seq, max(seq) AS seq, sum(jsonb_array_length(data -> 'tickets')) AS tickets
    FROM event
    WHERE campaign_id = $1 AND seq BETWEEN $2 AND $3 AND kind = $4 GROUP BY order_seq
), changed AS (
    UPDATE orders o SET live = o.live - given.tickets, changed_by = given.seq,
        state = CASE WHEN o.live = given.tickets THEN 'cancelled' ELSE o.state END
    FROM given WHERE o.campaign_id = $1 AND o.seq = given.order_seq
    RETURNING given.order_seq
)
SELECT refuse('an order was cancelled that is not there') FROM given
WHERE order_seq NOT IN (SELECT order_seq FROM changed);

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

-- name: add_audit_rows -- What people did, in the events numbered $2 to $3: kinds $4, by none of $5.
INSERT INTO audit_log (at, actor, action, target, campaign_id, reason, data)
-- The target of a step on an order is its public number (domain/order.py).
SELECT e.at, coalesce(e.actor, 'engine'),
    CASE WHEN e.order_seq IS NULL THEN 'campaign.' ELSE 'order.' END || e.kind,
    coalesce(e.campaign_id || '.' || to_hex(o.seq) || '.' || lpad(
        to_hex((extract(epoch FROM o.created_at) * 1000)::bigint & 16777215), 6, '0'), e.campaign_id),
    e.campaign_id, e.reason, coalesce(e.data, '{}') || jsonb_build_object('seq', e.seq)
FROM event e
LEFT JOIN orders o ON o.campaign_id = e.campaign_id AND o.seq = e.order_seq
WHERE e.campaign_id = $1 AND e.seq BETWEEN $2 AND $3 AND e.kind = ANY ($4)
    AND coalesce(e.actor, '') <> ALL ($5)
ORDER BY e.seq;

-- name: record_conflict -- An event that the constraints refused to act on.
INSERT INTO conflict (campaign_id, seq, at, why, event) VALUES ($1, $2, $3, $4, $5);

-- name: conflicts_to_pause -- Campaigns with a conflict that have not been paused for it.
SELECT campaign_id, min(why) AS why FROM conflict
WHERE paused_at IS NULL GROUP BY campaign_id;

-- name: conflict_rows -- Rows of table conflict of each campaign, whatever their source.
SELECT campaign_id, count(*) AS refused FROM conflict GROUP BY campaign_id;

-- name: mark_paused -- The campaign has been paused for its conflicts.
UPDATE conflict SET paused_at = now() WHERE campaign_id = $1 AND paused_at IS NULL;
