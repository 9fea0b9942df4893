-- name: campaigns -- All that are to be audited: a rehearsal that was purged is nowhere any more.
SELECT campaign_id FROM campaign WHERE purged_at IS NULL;

-- name: purged -- Whether a campaign was a rehearsal that was purged.
SELECT purged_at IS NOT NULL FROM campaign WHERE campaign_id = $1;

-- name: applied -- How far a campaign is applied, and what it has come to.
SELECT applied, chain, state, opens_at, closes_at, price_fen, card_limit, epoch
FROM campaign WHERE campaign_id = $1;

-- name: conflicts -- Sales that the constraints refused.
SELECT seq, why FROM conflict WHERE campaign_id = $1 AND source = 'refused' ORDER BY seq LIMIT 10;

-- name: untold -- What members were told and does not stand.
SELECT seq, why FROM conflict WHERE campaign_id = $1 AND source <> 'refused' ORDER BY seq LIMIT 10;

-- name: sales_without_order -- Sales of the ledger that have neither an order nor a conflict.
SELECT e.seq FROM event e
LEFT JOIN orders o ON o.campaign_id = e.campaign_id AND o.seq = e.seq
WHERE e.campaign_id = $1 AND e.kind IN ('sold', 'held')
  AND (o.seq IS NULL OR (o.member_no, o.showing_no, o.quantity, o.key_hash, o.price_fen, o.created_at)
       IS DISTINCT FROM (e.member_no, e.showing_no, e.quantity, e.key_hash, e.price_fen, e.at))
  AND NOT EXISTS (SELECT FROM conflict c WHERE c.campaign_id = e.campaign_id AND c.seq = e.seq
                  AND c.source = 'refused')
ORDER BY e.seq LIMIT 10;

-- name: orders_without_sale -- Orders that no sale of the ledger made.
SELECT o.seq FROM orders o
LEFT JOIN event e ON e.campaign_id = o.campaign_id AND e.seq = o.seq
    AND e.kind IN ('sold', 'held')
WHERE o.campaign_id = $1 AND e.seq IS NULL ORDER BY o.seq LIMIT 10;

-- name: showings -- Stock, the counter, and what the live orders really add up to.
SELECT s.showing_no, s.showing_id, s.stock, s.live, coalesce(o.live, 0)::bigint AS really
FROM showing s LEFT JOIN (
    SELECT showing_no, sum(live) AS live FROM orders WHERE campaign_id = $1 GROUP BY showing_no
) o USING (showing_no)
WHERE s.campaign_id = $1 ORDER BY s.showing_no;

-- name: members_miscounted -- Members whose counter is not what their live orders add up to, or over.
SELECT coalesce(o.member_no, u.member_no) AS member_no, coalesce(u.live, 0) AS live,
    coalesce(o.live, 0)::bigint AS really
FROM (
    SELECT member_no, sum(live) AS live FROM orders WHERE campaign_id = $1 GROUP BY member_no
) o FULL JOIN (SELECT member_no, live FROM member_use WHERE campaign_id = $1) u USING (member_no)
WHERE coalesce(u.live, 0) <> coalesce(o.live, 0) OR coalesce(o.live, 0) > $2
LIMIT 10;

-- name: sold_to_revoked -- Sales later than a second after the member ceased to be active.
-- The feed's moment is before its commit, so a second is allowed for that. The feed is small beside
-- the ledger and stands first: asking it for each sale took four times as long.
SELECT e.seq FROM member_change c
JOIN event e ON e.member_no = c.member_no AND e.campaign_id = $1
  AND e.kind IN ('sold', 'held') AND e.at > c.at + interval '2 seconds'
WHERE NOT c.active AND NOT EXISTS (
    SELECT FROM member_change later
    WHERE later.member_no = c.member_no AND later.rev > c.rev AND later.at <= e.at)
ORDER BY e.seq LIMIT 10;

-- name: roster_ahead -- Changes after revision $1 that were made before $2.
SELECT count(*) FROM member_change WHERE rev > $1 AND at < $2;

-- name: sold_to_others -- Sales to members whose union may not buy; $2 are the codes.
-- Not those to a member who was in such a union less than $3 before: the token may say so still.
SELECT e.seq FROM event e JOIN member m USING (member_no)
WHERE e.campaign_id = $1 AND e.kind IN ('sold', 'held') AND m.updated_at < e.at - interval '2 seconds'
  AND m.union_code <> ALL ($2::text[])
  AND NOT EXISTS (
    SELECT FROM member_union_change moved WHERE moved.member_no = m.member_no
    AND moved.union_before = ANY ($2::text[]) AND moved.at > e.at - $3::interval)
ORDER BY e.seq LIMIT 10;

-- name: steps_unaccounted -- Steps of people that the audit log does not tell, or without a why.
-- Of the kinds $2, by none of $3; those of the kinds $4 need a reason.
SELECT e.seq, e.kind FROM event e
LEFT JOIN audit_log l ON l.campaign_id = e.campaign_id AND l.data ->> 'seq' = e.seq::text
WHERE e.campaign_id = $1 AND e.kind = ANY ($2) AND coalesce(e.actor, '') <> ALL ($3)
  AND (l.id IS NULL OR l.actor IS DISTINCT FROM coalesce(e.actor, 'engine')
       OR l.reason IS DISTINCT FROM e.reason
       OR (e.kind = ANY ($4) AND e.reason IS NULL))
ORDER BY e.seq LIMIT 10;

-- name: changed_orders -- Orders that have changed since they were made, with the tickets given back.
SELECT o.member_no, o.seq, o.state, o.live, o.changed_by, o.paid, o.returned,
    ARRAY(SELECT t.no FROM ticket t WHERE t.campaign_id = o.campaign_id AND t.seq = o.seq
        AND t.state = 'cancelled' ORDER BY t.no) AS given_back
FROM orders o WHERE o.campaign_id = $1 AND o.changed_by > 0 ORDER BY o.seq;

-- name: money_not_presented -- Money that has waited for the ledger for more than a minute.
SELECT payment_no FROM payment
WHERE campaign_id = $1 AND state = 'paid' AND event_seq IS NULL AND paid_at < now() - interval '1 minute'
ORDER BY payment_no LIMIT 10;

-- name: money_unaccounted -- Money that is neither a live ticket nor a refund, or is both.
SELECT p.payment_no, p.paid_fen, counted FROM (
    SELECT p.payment_no, p.paid_fen,
        CASE WHEN p.outcome = 'returned' THEN 0 ELSE o.live * o.price_fen END
        + coalesce((SELECT sum(r.amount_fen) FROM refund r WHERE r.payment_no = p.payment_no), 0) AS counted
    FROM payment p JOIN orders o ON o.campaign_id = p.campaign_id AND o.seq = p.order_seq
    WHERE p.campaign_id = $1 AND p.event_seq IS NOT NULL
) p WHERE counted <> paid_fen ORDER BY payment_no LIMIT 10;

-- name: paid_without_money -- Orders that the ledger calls paid, though no money came in.
SELECT o.seq FROM orders o
LEFT JOIN payment p ON p.campaign_id = o.campaign_id AND p.order_seq = o.seq AND p.state = 'paid'
WHERE o.campaign_id = $1 AND o.paid AND p.payment_no IS NULL ORDER BY o.seq LIMIT 10;
