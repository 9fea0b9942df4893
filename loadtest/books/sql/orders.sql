SELECT
    o.seq,
    o.member_no,
    s.showing_id,
    o.quantity,
    o.price_fen,
    o.state,
    o.key_hash,
    (extract(epoch FROM o.created_at) * 1000)::bigint AS created_at_ms
FROM orders o
LEFT JOIN showing s USING (campaign_id, showing_no)
WHERE o.campaign_id = $1
ORDER BY o.seq;
