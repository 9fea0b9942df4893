-- applied.lua: how far the writer has carried the ledger to PostgreSQL.
--
-- Guarantee: none about sales; API processes forget what they acknowledged once it is applied, and
-- purchase.lua sells nothing where PostgreSQL is too far behind. Not an event: a recovery asks
-- PostgreSQL itself.
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
  -- What came since the writer looked is not older than this.
  since = string.format('%.0f', head.behind_since or head.now)
end
redis.call('HSET', HEAD, 'applied', applied, 'behind_since', since)
return { OK, head.seq, head.state }
