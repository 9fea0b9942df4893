-- recover.lua: replaces a campaign's state by one that was built beside it, in one step.
--
-- Guarantee: the script replaces the old state only if it is still the one that was compared (number,
-- chain hash) and sells nothing: it has no head, or one marked as recovering. The `recovered` event has
-- the next number and the next epoch, so Redis refuses every earlier number (INV-5), and each API
-- process checks its mark of the old epoch again (INV-8). The campaign sells nothing before `revoked`
-- is loaded again (roster_rev, see sync_revoked.lua). The call numbers stay (INV-4).
--
-- KEYS   the eight, then the new stream stock members operations holds
-- ARGV   number and chain hash of the old head ('' and '' for none) · number and chain hash of the
--        new state · epoch · clock ms · '1' to keep the existing stream ·
--        state · the campaign (as create.lua has it; its tickets are not used) · nonce · members, stock
--        fields, operations and stream entries of the new keys · actor · reason (JSON strings) ·
--        PostgreSQL's last event · ranges of numbers that are voided (JSON array) · number of the
--        `created` event · number of the event that gave the configuration · holds of the new key
-- Reply  {0, event number, state} · {STALE} (the old head has changed, or may sell) ·
--        {BROKEN} (the new keys are not complete)
-- Idempotency  by the old head's number. Cost: constant, however large: keys are renamed, and
--        the old ones freed in the background.

local HOLDS = KEYS[8]
local NEW_STREAM, NEW_STOCK, NEW_MEMBERS, NEW_OPERATIONS, NEW_HOLDS = KEYS[9], KEYS[10], KEYS[11], KEYS[12], KEYS[13]
-- Members could not pay while the campaign was away, and learn of it only now.
local GRACE_MS = 60000

-- Not by read_head, because a damaged head must be replaceable too.
local old = redis.call('HMGET', HEAD, 'seq', 'chain', 'recovering')
if (old[1] or '') ~= ARGV[1] or (old[2] or '') ~= ARGV[2] or (old[1] and not old[3]) then
  return { STALE }
end
local base, keep = ARGV[3], ARGV[7] == '1'
local last = redis.call('XREVRANGE', keep and STREAM or NEW_STREAM, '+', '-', 'COUNT', 1)[1]
if (keep and not last) or (last and last[1] ~= base .. '-0')
  or redis.call('HLEN', NEW_MEMBERS) ~= tonumber(ARGV[11])
  or redis.call('HLEN', NEW_STOCK) ~= tonumber(ARGV[12])
  or redis.call('HLEN', NEW_OPERATIONS) ~= tonumber(ARGV[13])
  or redis.call('ZCARD', NEW_HOLDS) ~= tonumber(ARGV[21])
  or redis.call('XLEN', NEW_STREAM) ~= tonumber(ARGV[14]) then
  return { BROKEN }
end
local run_id, replid = identity()
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local campaign = cmsgpack.unpack(ARGV[9])
local head = { seq = tonumber(base), chain = ARGV[4], epoch = tonumber(ARGV[5]),
  now = math.max(now, tonumber(ARGV[6])), state = ARGV[8],
  opens_at = campaign.opens_at, closes_at = campaign.closes_at, applied = tonumber(ARGV[17]) }

local function replace(key, by)
  redis.call('UNLINK', key)
  if redis.call('EXISTS', by) == 1 then
    redis.call('RENAME', by, key)
  end
end
if not keep then
  replace(STREAM, NEW_STREAM)
end
replace(STOCK, NEW_STOCK)
replace(MEMBERS, NEW_MEMBERS)
replace(OPERATIONS, NEW_OPERATIONS)
replace(HOLDS, NEW_HOLDS)
redis.call('UNLINK', REVOKED, HEAD)
append(head, { '["recovered",{"actor":' .. ARGV[15] .. ',"reason":' .. ARGV[16]
  .. ',"epoch":' .. ARGV[5] .. ',"voided":' .. ARGV[18] .. '}]' })
redis.call('HSET', HEAD, 'config', campaign.config, 'rules', cmsgpack.pack(campaign.rules), 'made', ARGV[19],
  'config_seq', ARGV[20], 'epoch', ARGV[5],
  'applied', ARGV[17], 'behind_since', string.format('%.0f', head.now),
  'grace_until', string.format('%.0f', head.now + GRACE_MS),
  'nonce', ARGV[10], 'run_id', run_id, 'replid', replid)
advance(head)
return { OK, head.seq, head.state }
