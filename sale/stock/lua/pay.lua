-- pay.lua: decides what money that came in for an order does.
--
-- Guarantee: an order is paid once (INV-11). A hold is kept; one that has expired is revived where
-- the campaign is open, the tickets are left, the member is within the limits and not revoked;
-- everything else is returned, and the money goes back.
--
-- ARGV   nonce · member · order number · sold at, low 24 bits · amount_fen that came in
-- Reply  {0, event number, 'kept' 'revived' or 'returned', now ms, the record, the event (JSON)}
--        {REPLAYED, event number that changed it last, '', now ms, the record} (it is paid already)
--        {DUE} (its time is up: run expire.lua and ask again) · {NOT_FOUND}
--        {WRONG_STATE, …} (recovering) · {MISSING} {UNVERIFIED} {BROKEN}
-- Idempotency  by the paid flag. Cost: constant.

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[1])
if refusal then
  return { refusal }
end
local member = ARGV[2]
local value = redis.call('HGET', MEMBERS, member) or ''
local order = find_order(value, tonumber(ARGV[3]))
if not order or order.sold_at % 16777216 ~= tonumber(ARGV[4]) then
  return { NOT_FOUND }
end
local function record()
  return string.sub(value, order.from, order.to)
end
if order.paid then
  return { REPLAYED, order.changed, '', head.now, record() }
elseif head.recovering then
  return { WRONG_STATE, head.seq, 'recovering' }
elseif order.state == HELD and may_expire(head)
  and tonumber(redis.call('ZSCORE', HOLDS, hold_name(order, member))) <= head.now then
  return { DUE }
end

local events = {}
apply_clock(head, events)
local rules, outcome = cmsgpack.unpack(head.rules), 'returned'
local was_held = order.state == HELD
if was_held then
  outcome = 'kept'
elseif order.state == EXPIRED and head.state == 'open'
  and redis.call('SISMEMBER', REVOKED, member) == 0
  and tonumber(redis.call('HGET', STOCK, 'r' .. order.showing)) >= order.quantity then
  local live, of_showing = held_tickets(value, order.showing)
  local showing_limit = (rules.showing_limits or {})[order.showing + 1] or rules.card_limit
  if live + order.quantity <= rules.card_limit and of_showing + order.quantity <= showing_limit then
    outcome = 'revived'
  end
end
local event = '["paid",{"order":' .. string.format('%.0f', order.seq) .. ',"member_no":' .. member
  .. ',"outcome":"' .. outcome .. '","amount_fen":' .. ARGV[5] .. '}]'
events[#events + 1] = event
order.paid, order.changed = true, head.seq + #events
if outcome == 'returned' then
  order.returned = true
else
  order.state, order.live = CONFIRMED, order.quantity
end

append(head, events)
value = put_order(value, order)
redis.call('HSET', MEMBERS, member, value)
if was_held then
  redis.call('HINCRBY', STOCK, 'h' .. order.showing, -order.quantity)
  redis.call('ZREM', HOLDS, hold_name(order, member))
elseif outcome == 'revived' then
  redis.call('HINCRBY', STOCK, 'r' .. order.showing, -order.quantity)
end
advance(head)
return { OK, head.seq, outcome, head.now, record(), event }
