-- name: hand_in -- Acknowledged steps; one that two processes know is the same row.
-- What was told in a rehearsal that is gone is owed to nobody.
INSERT INTO handed_in (campaign_id, seq, epoch, at, step, process)
SELECT $1, seq, epoch, at, step::jsonb, $2
FROM unnest($3::bigint[], $4::int[], $5::timestamptz[], $6::text[]) AS told (seq, epoch, at, step)
WHERE NOT EXISTS (SELECT FROM campaign WHERE campaign_id = $1 AND purged_at IS NOT NULL)
ON CONFLICT (campaign_id, seq, jsonb_hash_extended(step, 0)) DO NOTHING;

-- name: unsettled -- What was handed in beyond number $2, at most $4 rows beyond number $3.
SELECT seq, epoch, at, step
FROM handed_in
WHERE campaign_id = $1 AND settled IS NULL AND seq > $2 AND seq > $3
ORDER BY seq, id LIMIT $4;

-- name: highest -- Highest number that was handed in and is not settled; 0 where there is none.
SELECT coalesce(max(seq), 0) FROM handed_in WHERE campaign_id = $1 AND settled IS NULL;

-- name: settle -- Compares what was handed in with the ledger, as far as it is applied.
-- What does not stand is a conflict: a member was told something that is not so.
WITH judged AS (
    SELECT h.id, h.campaign_id, h.seq, h.epoch, h.at, h.step, h.process, e.kind,
        event_row(e) = h.step AS stands,
        (SELECT o.seq FROM orders o
            WHERE o.member_no
                = CASE WHEN h.step ->> 0 IN ('sold', 'held') THEN (h.step ->> 1)::integer END
            AND o.campaign_id = h.campaign_id AND o.key_hash = h.step ->> 4) AS elsewhere
    FROM handed_in h
    JOIN campaign c ON c.campaign_id = h.campaign_id AND h.seq <= c.applied
    JOIN event e ON e.campaign_id = h.campaign_id AND e.seq = h.seq
    WHERE h.settled IS NULL
    ORDER BY h.campaign_id, h.seq LIMIT $1
), told AS (
    INSERT INTO conflict (campaign_id, seq, at, why, event, source, paused_at)
    SELECT campaign_id, seq, at,
        'it was acknowledged, and the ledger has ' || kind || ' under this number' || coalesce(
            '; the same key of the member stands as event ' || elsewhere, ''),
        jsonb_build_object('seq', seq, 'epoch', epoch, 'row', step, 'process', process),
        'handed_in', now()
    FROM judged WHERE NOT stands
    ON CONFLICT (campaign_id, seq, source, jsonb_hash_extended(event, 0)) DO NOTHING
)
UPDATE handed_in h SET settled = CASE WHEN judged.stands THEN 'stands' ELSE 'conflict' END
FROM judged WHERE h.id = judged.id
RETURNING h.campaign_id, h.seq, h.settled;

-- name: forked -- Events that a Redis told and the ledger does not have: numbers, moments, whys, events.
INSERT INTO conflict (campaign_id, seq, at, why, event, source, paused_at)
SELECT $1, seq, at, why, event::jsonb, 'forked', now()
FROM unnest($2::bigint[], $3::timestamptz[], $4::text[], $5::text[]) AS told (seq, at, why, event)
ON CONFLICT (campaign_id, seq, source, jsonb_hash_extended(event, 0)) DO NOTHING;

-- name: conflicts -- A campaign's conflicts, newest first, at most $2.
SELECT seq, at, why, event, source, found_at FROM conflict
WHERE campaign_id = $1 ORDER BY id DESC LIMIT $2;

-- name: voided -- Ranges of a campaign's numbers that were voided: first, last.
SELECT min(seq) AS first, max(seq) AS last FROM (
    SELECT seq, seq - row_number() OVER (ORDER BY seq) AS run
    FROM event WHERE campaign_id = $1 AND kind = 'voided'
) v GROUP BY run ORDER BY first LIMIT $2;
