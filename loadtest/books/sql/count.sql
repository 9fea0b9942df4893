SELECT count(*) FROM orders WHERE campaign_id = $1;
