-- create.lua: creates a campaign, as a draft or scheduled.
--
-- Guarantee: a campaign is created once; after a deleted draft its ledger goes on with the next number
-- (INV-5). It sells nothing before `revoked` is loaded (roster_rev, see sync_revoked.lua). The load
-- begins anew, because the set of a deleted draft was not kept up to date.
--
-- ARGV   op · content hash · actor (JSON string) · reason (JSON string or null) · nonce ·
--        the campaign (MessagePack, see head.py): {config (JSON text), rules (by name),
--        opens_at, closes_at (ms or nil), tickets (of showing 0, 1, 2 …)} · '1' to schedule at once
-- Reply  {0, event number, state} · {REPLAYED or MISMATCH, event number} · {EXISTS} ·
--        {WRONG_STATE, event number, 'recovering'} ·
--        {UNVERIFIED} {STALE} {BROKEN} (for the deleted draft; BROKEN also if only its stream is left)
-- Idempotency  by op. Cost: constant.

local done = replay(ARGV[1], ARGV[2])
if done then
  return done
end
local head = read_head()
if head and head.state ~= 'deleted' then
  return { EXISTS }
end
local run_id, replid = identity()
if head then
  local refusal = check_trusted(head, ARGV[5])
  if refusal then
    return { refusal }
  end
  if head.recovering then
    return { WRONG_STATE, head.seq, 'recovering' }
  end
elseif redis.call('EXISTS', STREAM) == 1 then
  return { BROKEN }
else
  local time = redis.call('TIME')
  head = { seq = 0, chain = string.rep('0', 40), epoch = 1,
    now = time[1] * 1000 + math.floor(time[2] / 1000) }
end
local campaign = cmsgpack.unpack(ARGV[6])
head.opens_at, head.closes_at = campaign.opens_at, campaign.closes_at
head.state = ARGV[7] == '1' and 'scheduled' or 'draft'

-- Both events hold the operation, so that the fold finds it under the number in the reply.
local who = '"actor":' .. ARGV[3] .. ',"reason":' .. ARGV[4]
  .. ',"op":"' .. ARGV[1] .. '","content":"' .. ARGV[2] .. '"'
local events = { '["created",{' .. who
  .. ',"config":' .. campaign.config .. ',"opens_at":' .. json_ms(head.opens_at)
  .. ',"closes_at":' .. json_ms(head.closes_at) .. '}]' }
if head.state == 'scheduled' then
  events[2] = '["scheduled",{' .. who .. ',"opens_at":' .. json_ms(head.opens_at) .. '}]'
end

local made = string.format('%.0f', head.seq + 1)
append(head, events)
redis.call('HSET', HEAD, 'config', campaign.config, 'rules', cmsgpack.pack(campaign.rules), 'config_seq', made, 'made', made,
  'epoch', head.epoch, 'applied', head.applied or 0, 'nonce', ARGV[5], 'run_id', run_id, 'replid', replid)
redis.call('HDEL', HEAD, 'roster_rev', 'roster_load')
redis.call('UNLINK', STOCK, MEMBERS, REVOKED, KEYS[8])
for i = 1, #campaign.tickets do
  local tickets = string.format('%.0f', campaign.tickets[i])
  redis.call('HSET', STOCK, 't' .. (i - 1), tickets, 'r' .. (i - 1), tickets, 'k' .. (i - 1), 0, 'h' .. (i - 1), 0)
end
redis.call('HSET', OPERATIONS, ARGV[1], head.seq .. ':' .. ARGV[2])
advance(head)
return { OK, head.seq, head.state }
