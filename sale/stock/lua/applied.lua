-- applied.lua: records how far the writer has copied the ledger to PostgreSQL.
--
-- Guarantee: none about sales. API processes drop acknowledged sales once they are applied, and
-- purchase.lua sells nothing if PostgreSQL is too far behind. This is no event, because a recovery
-- reads PostgreSQL's position from PostgreSQL.
--
-- ARGV   number of the last applied event · campaign clock (ms) of the oldest event after it, or ''
-- Reply  {0, event number, state} · {MISSING} · {STALE} (PostgreSQL is ahead of this Redis)
-- Idempotency  by what it writes. Cost: constant.

local head = read_head()
if not head then
  return { MISSING }
end
local applied = tonumber(ARGV[1])
if applied > head.seq then
  return { STALE }
end
local since = applied == head.seq and '' or ARGV[2]
if since == '' and applied < head.seq then
  -- Events that were appended since the writer looked are not older than this.
  since = string.format('%.0f', head.behind_since or head.now)
end
redis.call('HSET', HEAD, 'applied', applied, 'behind_since', since)
return { OK, head.seq, head.state }
