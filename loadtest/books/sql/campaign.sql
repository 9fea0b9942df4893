SELECT card_limit, applied, (extract(epoch FROM opens_at) * 1000)::bigint AS opens_at_ms
FROM campaign WHERE campaign_id = $1;
