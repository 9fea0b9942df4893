-- name: try_lock -- Take an advisory lock for this session; false where another session holds it.
SELECT pg_try_advisory_lock($1);

-- name: unlock -- Give back what the session has, so that the next need not wait for its end.
SELECT pg_advisory_unlock_all();

-- name: expel -- End other sessions of the name $1: those of a holder that has lost its lock.
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE application_name = $1 AND datname = current_database() AND usename = current_user
    AND pid <> pg_backend_pid();

-- name: members -- Processes connected for the leader lock named $1; which of them holds lock $2.
SELECT substr(application_name, length($1::text) + 2) AS who,
    EXISTS (
        SELECT FROM pg_locks
        WHERE pg_locks.pid = pg_stat_activity.pid AND locktype = 'advisory' AND granted
            AND (classid::bigint << 32 | objid::bigint) = $2::bigint AND objsubid = 1
    ) AS active
FROM pg_stat_activity
WHERE starts_with(application_name, $1 || ' ') AND datname = current_database()
ORDER BY active DESC, who;
