-- An index holds no more than 2,704 bytes of a row, and an event may be longer: by a hash of it.

alter table conflict drop constraint conflict_once;
create unique index conflict_once
    on conflict (campaign_id, seq, source, jsonb_hash_extended(event, 0));
