-- transition.lua: an operator's step from one state to the next.
--
-- Guarantee: the states follow draft → scheduled → open ⇄ paused → closed only. The script records
-- first what the clock has changed since the last call (INV-7), and writes actor and reason into the
-- event (INV-10).
--
-- ARGV   action (schedule open pause resume close reopen delete) · op · content hash ·
--        actor (JSON string) · reason (JSON string or null) · nonce · opens_at for schedule (ms or '')
-- Reply  {0, event number, state, chain hash} · {WRONG_STATE, event number, state} ·
--        {INVALID} (schedule without a moment) · {REPLAYED or MISMATCH, event number} ·
--        {MISSING} {UNVERIFIED} {BROKEN}
-- Idempotency  by op. Cost: constant.

local ALLOWED = {
  schedule = { draft = true, scheduled = true },
  open = { draft = true, scheduled = true },
  pause = { open = true },
  resume = { paused = true },
  close = { scheduled = true, open = true, paused = true },
  reopen = { closed = true },
  delete = { draft = true },
}
local KIND = { schedule = 'scheduled', open = 'opened', pause = 'paused', resume = 'resumed',
  close = 'closed', reopen = 'reopened', delete = 'deleted' }
local STATE = { schedule = 'scheduled', open = 'open', pause = 'paused', resume = 'open',
  close = 'closed', reopen = 'open', delete = 'deleted' }

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[6])
if refusal then
  return { refusal }
end
local done = replay(ARGV[2], ARGV[3])
if done then
  done[3] = head.state
  return done
end

local action, events = ARGV[1], {}
apply_clock(head, events)
if head.recovering or not ALLOWED[action][head.state] then
  return { WRONG_STATE, head.seq, head.recovering and 'recovering' or head.state }
end
local window = ''
if action == 'schedule' then
  head.opens_at = tonumber(ARGV[7]) or head.opens_at
  if not head.opens_at or (head.closes_at and head.closes_at <= head.opens_at) then
    return { INVALID, head.seq, head.state }
  end
  window = ',"opens_at":' .. json_ms(head.opens_at)
elseif action == 'open' or action == 'reopen' then
  if action == 'open' or not head.opens_at or head.opens_at > head.now then
    head.opens_at = head.now
    window = ',"opens_at":' .. json_ms(head.now)
  end
  -- A closing moment that has passed would close it again with the next call.
  if head.closes_at and head.closes_at <= head.now then
    head.closes_at = nil
    window = window .. ',"closes_at":null'
  end
end
head.state = STATE[action]
events[#events + 1] = '["' .. KIND[action] .. '",{"actor":' .. ARGV[4] .. ',"reason":' .. ARGV[5]
  .. ',"op":"' .. ARGV[2] .. '","content":"' .. ARGV[3] .. '"' .. window .. '}]'

append(head, events)
redis.call('HSET', OPERATIONS, ARGV[2], head.seq .. ':' .. ARGV[3])
advance(head)
return { OK, head.seq, head.state, head.chain }
