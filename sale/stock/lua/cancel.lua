-- cancel.lua: gives tickets of an order back.
--
-- Guarantee: a ticket is given back once (INV-6), is on sale again and off the member's limit in
-- the same step; a collected one never; a hold only whole; money goes back exactly for what was paid
-- (INV-11). Members until `cancel_until`, operators at any time.
--
-- ARGV   incarnation in which this process checked what it acknowledged and event number that it has
--        seen ('' and 0: the caller answers no member) · nonce ·
--        member · order number · sold at, the low 24 bits that the public number has ·
--        ticket numbers, '1,2' ('': all that can be) · '1' for a member, whose time is limited ·
--        actor · reason (JSON strings or null)
-- Reply  {0, event number (0: nothing was left to do), chain hash, now ms, the record, tickets given
--         back, the event (JSON)}
--        {INVALID, number of the ticket that is not there, now ms}
--        {WRONG_STATE, why, now ms, the record}, why: 1 expired, 2 collected, 3 too late, 4 only whole,
--        5 recovering
--        {NOT_FOUND} · {DUE} (its time is up: run expire.lua and ask again)
--        {MISSING} {UNVERIFIED} {UNCHECKED} {STALE} {BROKEN}
-- Idempotency  by the tickets' state: given back already counts as done. Cost: constant.

local EXPIRED_WHY, COLLECTED_WHY, LATE_WHY, WHOLE_WHY, RECOVERING_WHY = 1, 2, 3, 4, 5

local head = read_head()
if not head then
  return { MISSING }
end
local refusal
if ARGV[1] == '' then
  refusal = check_trusted(head, ARGV[3])
else
  refusal = check_trusted(head, ARGV[3], ARGV[1], tonumber(ARGV[2]))
end
if refusal then
  return { refusal }
end
local member, for_member = ARGV[4], ARGV[8] == '1'
local value = redis.call('HGET', MEMBERS, member) or ''
local order = find_order(value, tonumber(ARGV[5]))
if not order or order.sold_at % 16777216 ~= tonumber(ARGV[6]) then
  return { NOT_FOUND }
end
local function record()
  return string.sub(value, order.from, order.to)
end

local wanted, all = {}, ARGV[7] == ''
for number in string.gmatch(ARGV[7], '%d+') do
  local no = tonumber(number)
  if no < 1 or no > order.quantity then
    return { INVALID, no, head.now }
  end
  wanted[no] = true
end
local given, collected = {}, false
local letters = {}
for no = 1, order.quantity do
  local letter = string.sub(order.letters, no, no)
  if all or wanted[no] then
    if letter == 'v' then
      given[#given + 1] = no
      letter = 'x'
    elseif letter == 'c' then
      collected = true
    end
  end
  letters[no] = letter
end

if order.state == EXPIRED then
  return { WRONG_STATE, EXPIRED_WHY, head.now, record() }
elseif #given == 0 and not collected then
  return { OK, 0, '', head.now, record(), 0, '' }
elseif collected and (not all or #given == 0) then
  return { WRONG_STATE, COLLECTED_WHY, head.now, record() }
elseif head.recovering then
  return { WRONG_STATE, RECOVERING_WHY, head.now, record() }
end
local rules = cmsgpack.unpack(head.rules)
if order.state == HELD then
  if may_expire(head) and tonumber(redis.call('ZSCORE', HOLDS, hold_name(order, member))) <= head.now then
    return { DUE }
  elseif #given ~= order.quantity then
    return { WRONG_STATE, WHOLE_WHY, head.now, record() }
  end
elseif for_member and (not rules.cancel_until or head.now >= rules.cancel_until) then
  return { WRONG_STATE, LATE_WHY, head.now, record() }
end

local events = {}
apply_clock(head, events)
local refund = order.paid and #given * rules.price_fen or 0
local event = '["cancelled",{"order":' .. string.format('%.0f', order.seq) .. ',"member_no":' .. member
  .. ',"tickets":[' .. table.concat(given, ',') .. '],"refund_fen":' .. string.format('%.0f', refund)
  .. ',"actor":' .. ARGV[9] .. (ARGV[10] ~= 'null' and ',"reason":' .. ARGV[10] or '') .. '}]'
events[#events + 1] = event
local was_held = order.state == HELD
order.live, order.letters, order.changed = order.live - #given, table.concat(letters), head.seq + #events
if order.live == 0 then
  order.state = CANCELLED
end

append(head, events)
value = put_order(value, order)
redis.call('HSET', MEMBERS, member, value)
redis.call('HINCRBY', STOCK, 'r' .. order.showing, #given)
if was_held then
  redis.call('HINCRBY', STOCK, 'h' .. order.showing, -#given)
  redis.call('ZREM', HOLDS, hold_name(order, member))
end
advance(head)
return { OK, head.seq, head.chain, head.now, record(), #given, event }
