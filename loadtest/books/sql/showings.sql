SELECT showing_id, stock FROM showing WHERE campaign_id = $1;
