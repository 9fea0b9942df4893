-- name: begin -- The payment of an order; a second call finds the first one's row.
INSERT INTO payment (
    payment_no, order_no, campaign_id, order_seq, member_no, amount_fen, provider, expires_at, next_at
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (order_no) DO UPDATE SET order_no = excluded.order_no
RETURNING *;

-- name: set_url -- Where a payment is paid.
UPDATE payment SET pay_url = $2 WHERE payment_no = $1;

-- name: one -- A payment by its number.
SELECT * FROM payment WHERE payment_no = $1;

-- name: of_order -- The payment of an order, with what has gone back.
SELECT p.*, coalesce((SELECT sum(amount_fen) FROM refund r
    WHERE r.payment_no = p.payment_no AND r.state = 'done'), 0)::bigint AS refunded_fen
FROM payment p WHERE p.order_no = $1;

-- name: of_orders -- What has gone back of each of these orders' payments.
SELECT p.order_no, sum(r.amount_fen)::bigint AS refunded_fen
FROM payment p JOIN refund r USING (payment_no)
WHERE p.order_no = ANY ($1) AND r.state = 'done' GROUP BY p.order_no;

-- name: record_paid -- Money came in. Once paid, no later notice changes it; another amount is for people.
UPDATE payment SET
    state = CASE WHEN amount_fen = $2 THEN 'paid' ELSE 'disputed' END,
    paid_fen = $2, paid_at = now(), provider_ref = $3, next_at = now(), tries = 0,
    trouble = CASE WHEN amount_fen = $2 THEN '' ELSE 'another amount came in' END
WHERE payment_no = $1 AND state IN ('open', 'closed');

-- name: record_closed -- No money can come in for it any more.
UPDATE payment SET state = 'closed', trouble = '' WHERE payment_no = $1 AND state = 'open';

-- name: take_payments -- Payments in a state that wait for the keeper; another one passes them over meanwhile.
-- Paid ones are to be presented, open ones to be asked about. The order's state, if it is applied.
UPDATE payment p SET next_at = now() + make_interval(secs => $3), tries = p.tries + 1
FROM (
    SELECT payment_no FROM payment
    WHERE next_at <= now() AND state = $1
        AND (state = 'open' OR (state = 'paid' AND event_seq IS NULL))
    ORDER BY next_at LIMIT $2 FOR UPDATE SKIP LOCKED
) due
WHERE p.payment_no = due.payment_no
RETURNING p.*, (SELECT o.state FROM orders o
    WHERE o.campaign_id = p.campaign_id AND o.seq = p.order_seq) AS order_state;

-- name: put_off_payment -- Try again later, and why.
UPDATE payment SET next_at = now() + make_interval(secs => $2), trouble = $3
WHERE payment_no = $1;

-- name: take_refunds -- Refunds that wait for the keeper, one of each payment at a time.
UPDATE refund r SET next_at = now() + make_interval(secs => $2), tries = r.tries + 1
FROM (
    SELECT refund_no FROM refund first
    WHERE next_at <= now() AND state IN ('due', 'sent') AND NOT EXISTS (
        SELECT FROM refund other WHERE other.payment_no = first.payment_no
        AND other.state IN ('due', 'sent') AND other.event_seq < first.event_seq)
    ORDER BY next_at LIMIT $1 FOR UPDATE SKIP LOCKED
) due
WHERE r.refund_no = due.refund_no
RETURNING r.*, (SELECT provider FROM payment p WHERE p.payment_no = r.payment_no) AS provider,
    (SELECT amount_fen FROM payment p WHERE p.payment_no = r.payment_no) AS total_fen;

-- name: set_refund -- A refund's state after a try, when it is looked at next, and why it failed.
-- One that the provider has accepted is asked about at growing intervals: it may take days.
UPDATE refund SET state = $2, trouble = $4,
    next_at = now() + CASE WHEN $2 = 'sent' AND $4 = ''
        THEN greatest(make_interval(secs => $3), least((now() - created_at) / 10, interval '10 minutes'))
        ELSE make_interval(secs => $3) END,
    tries = CASE WHEN $4 = '' THEN 0 ELSE tries END,
    done_at = CASE WHEN $2 = 'done' THEN now() END
WHERE refund_no = $1 AND state <> 'done';

-- name: refunds_by_state -- How many refunds there are in each state.
SELECT state, count(*)::bigint AS refunds FROM refund GROUP BY state;

-- name: money -- What was taken, kept, returned, is under way and is stuck, by campaign and day.
WITH back AS (
    SELECT payment_no,
        sum(amount_fen) FILTER (WHERE state = 'done') AS returned,
        sum(amount_fen) FILTER (WHERE state IN ('due', 'sent')) AS under_way,
        sum(amount_fen) FILTER (WHERE state = 'stuck') AS stuck
    FROM refund GROUP BY payment_no
)
SELECT p.campaign_id, (p.paid_at AT TIME ZONE $3)::date AS day,
    sum(p.paid_fen)::bigint AS taken_fen,
    coalesce(sum(b.returned), 0)::bigint AS returned_fen,
    (coalesce(sum(b.under_way), 0)
        + coalesce(sum(p.paid_fen) FILTER (WHERE p.state = 'paid' AND p.event_seq IS NULL), 0)
    )::bigint AS under_way_fen,
    (coalesce(sum(b.stuck), 0)
        + coalesce(sum(p.paid_fen) FILTER (WHERE p.state = 'disputed'), 0))::bigint AS stuck_fen,
    coalesce(sum(p.paid_fen) FILTER (WHERE p.event_seq IS NOT NULL), 0)::bigint
        - coalesce(sum(b.returned), 0)::bigint - coalesce(sum(b.under_way), 0)::bigint
        - coalesce(sum(b.stuck), 0)::bigint AS kept_fen
FROM payment p LEFT JOIN back b USING (payment_no)
WHERE p.paid_at IS NOT NULL
    AND ($1::date IS NULL OR (p.paid_at AT TIME ZONE $3)::date >= $1)
    AND ($2::date IS NULL OR (p.paid_at AT TIME ZONE $3)::date <= $2)
GROUP BY 1, 2 ORDER BY 2, 1;

-- name: stuck -- Money that only people can help, oldest first.
SELECT 'refund' AS what, r.refund_no AS number, p.order_no, r.amount_fen, r.trouble
FROM refund r JOIN payment p USING (payment_no) WHERE r.state = 'stuck'
UNION ALL
SELECT 'payment', payment_no, order_no, paid_fen, trouble FROM payment WHERE state = 'disputed'
ORDER BY 2 LIMIT $1;

-- name: stuck_sums -- The same, added up by kind.
SELECT 'refunds are stuck' AS what, count(*)::bigint AS rows, sum(amount_fen)::bigint AS amount_fen
FROM refund WHERE state = 'stuck' HAVING count(*) > 0
UNION ALL
SELECT 'payments are disputed', count(*)::bigint, sum(paid_fen)::bigint
FROM payment WHERE state = 'disputed' HAVING count(*) > 0;

-- name: test_begin -- A payment at the test provider.
INSERT INTO test_payment (payment_no, amount_fen, expires_at, return_to) VALUES ($1, $2, $3, $4)
ON CONFLICT (payment_no) DO UPDATE SET return_to = excluded.return_to;

-- name: test_one -- A payment at the test provider.
SELECT * FROM test_payment WHERE payment_no = $1;

-- name: test_result -- The payer's act: paid or failed. Nothing follows paid or closed.
UPDATE test_payment SET state = $2, ref = CASE WHEN $2 = 'paid' THEN $3 ELSE '' END
WHERE payment_no = $1 AND state IN ('none', 'failed') AND now() < expires_at
RETURNING *;

-- name: test_close -- Takes no money for it any more; the state tells where it was paid before.
-- One that is not known is closed as well, so that a call to begin it that comes late finds it so.
INSERT INTO test_payment (payment_no, amount_fen, expires_at, state) VALUES ($1, 0, now(), 'closed')
ON CONFLICT (payment_no) DO UPDATE
    SET state = CASE WHEN test_payment.state = 'paid' THEN 'paid' ELSE 'closed' END
RETURNING state;

-- name: test_refund -- Sends money back, once under each number.
INSERT INTO test_refund (refund_no, payment_no, amount_fen)
SELECT $1, payment_no, $3::bigint FROM test_payment WHERE payment_no = $2 AND state = 'paid'
    AND amount_fen >= $3::bigint + (SELECT coalesce(sum(amount_fen), 0) FROM test_refund
        WHERE payment_no = $2 AND refund_no <> $1)
ON CONFLICT (refund_no) DO NOTHING;

-- name: test_refunded -- How much was sent back under a number; null: nothing.
SELECT amount_fen FROM test_refund WHERE refund_no = $1;
