-- peek.lua: reads a campaign's state and stock, without a purchase and without a write.
--
-- Guarantee: it gives the state and stock by which purchase.lua would decide at this moment, on a
-- Redis that was verified. With one small call the batcher refuses a thousand purchases of a
-- sold-out campaign, and none by a stale answer (INV-8).
--
-- ARGV   incarnation in which this process checked what it acknowledged · event number that it has
--        seen · nonce · showing numbers …
-- Reply  {0, now ms, seq, chain hash, epoch, state, opens_at ms or 0, roster revision, number of the
--        event that gave the configuration, when the next hold ends (ms, 0: there is none), 1 where
--        holds are due, left of each showing …, in holds of each showing …}
--        or {code}: MISSING UNVERIFIED UNCHECKED STALE BROKEN
-- Idempotency  reads only. Cost: constant.

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[3], ARGV[1], tonumber(ARGV[2]))
if refusal then
  return { refusal }
end
apply_clock(head, {})
local ends = next_hold_ends() or 0
local reply = { OK, head.now, head.seq, head.chain, head.epoch,
  head.recovering and 'recovering' or head.state, head.opens_at or 0, head.roster_rev or -1,
  head.config_seq, ends, ends > 0 and ends <= head.now and may_expire(head) and 1 or 0 }
local showings, said = #ARGV - 3, #reply
for i = 1, showings do
  local left = redis.call('HMGET', STOCK, 'r' .. ARGV[i + 3], 'h' .. ARGV[i + 3])
  if not left[1] then
    return { BROKEN }
  end
  reply[said + i], reply[said + showings + i] = tonumber(left[1]), tonumber(left[2]) or 0
end
return reply
