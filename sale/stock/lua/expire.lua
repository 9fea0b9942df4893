-- expire.lua: ends holds whose time is up, up to 256 a call, earliest first.
--
-- Guarantee: no other script ends a hold for its time (INV-6); tickets and limit are free again in
-- the same step. It works while a campaign is paused or closed, not while it is recovering, nor in
-- the minute after a recovery. pay_before never moves.
--
-- ARGV   nonce
-- Reply  {0, event number, how many ended, when the next hold ends (ms, 0: there is none), now ms,
--         moment from which holds may end, orders that are still held} · {MISSING} {UNVERIFIED} {BROKEN}
-- Idempotency  by the order's state. Cost: per order that ends, about what its sale did.

local EXPIRED_MAX = 256

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[1])
if refusal then
  return { refusal }
end
local function said(ended)
  return { OK, head.seq, ended, next_hold_ends() or 0, head.now, head.grace_until or 0,
    redis.call('ZCARD', HOLDS) }
end
local due = {}
if may_expire(head) then
  due = redis.call('ZRANGEBYSCORE', HOLDS, '-inf', string.format('%.0f', head.now), 'LIMIT', 0, EXPIRED_MAX)
end
if #due == 0 then
  return said(0)
end

local events, values, members, given_back = {}, {}, {}, {}
apply_clock(head, events)
for i = 1, #due do
  local seq, member = string.match(due[i], '^(%d+):(%d+)$')
  if not values[member] then
    values[member] = redis.call('HGET', MEMBERS, member) or ''
    members[#members + 1] = member
  end
  local order = find_order(values[member], tonumber(seq))
  if not order or order.state ~= HELD then
    return { BROKEN } -- holds and records are written in one step: one of them is lost (INV-8)
  end
  events[#events + 1] = '["expired",' .. seq .. ',' .. member .. ']'
  given_back[order.showing] = (given_back[order.showing] or 0) + order.live
  order.state, order.live, order.changed = EXPIRED, 0, head.seq + #events
  values[member] = put_order(values[member], order)
end

append(head, events)
for i = 1, #members do
  redis.call('HSET', MEMBERS, members[i], values[members[i]])
end
for showing, tickets in pairs(given_back) do
  redis.call('HINCRBY', STOCK, 'r' .. showing, tickets)
  redis.call('HINCRBY', STOCK, 'h' .. showing, -tickets)
end
redis.call('ZREM', HOLDS, unpack(due))
advance(head)
return said(#due)
