-- _orders.lua: put behind _ledger.lua before the scripts that change what members hold.
--
-- A member's value is one record an order, oldest first, 39 bytes and one letter a ticket:
--   key hash (16) · number of the event that made it (5) · sold at, ms (6) · showing number (2) ·
--   quantity as asked (2) · live: tickets that count (2) · flags (1) · number of the event that
--   changed it last, 0: none (5) · letters: v valid, c collected, x given back
-- flags: 1 held, 2 confirmed, 3 expired, 4 cancelled; + 8 paid; + 16 returned (it was paid when it
-- had ended, and the money goes back). Ended records stay, so that keys keep their meaning.
-- `holds`: order number:member → pay_before of each held order.

local HOLDS = KEYS[8]
local RECORD, FIELDS = 39, '>I5I6I2I2I2I1I5'
local HELD, CONFIRMED, EXPIRED, CANCELLED, PAID_FLAG, RETURNED_FLAG = 1, 2, 3, 4, 8, 16

-- The moment at which the next hold ends, or nil.
local function next_hold_ends()
  return tonumber(redis.call('ZRANGE', HOLDS, 0, 0, 'WITHSCORES')[2])
end

-- Whether holds may end now. For a minute after a recovery none does: its members could not pay.
local function may_expire(head)
  return not head.recovering and head.now >= (head.grace_until or 0)
end

-- One order of a member's value, to change: {from, to, key, seq, sold_at, showing, quantity, live,
-- state, paid, returned, changed, letters}; nil where there is none of that number.
local function find_order(value, wanted)
  local from = 1
  while from <= #value do
    local seq, sold_at, showing, quantity, live, flags, changed, at =
      struct.unpack(FIELDS, value, from + 16)
    if seq == wanted then
      return { from = from, to = at + quantity - 1, key = string.sub(value, from, from + 15),
        seq = seq, sold_at = sold_at, showing = showing, quantity = quantity, live = live,
        state = flags % 8, paid = math.floor(flags / 8) % 2 == 1,
        returned = math.floor(flags / 16) % 2 == 1, changed = changed,
        letters = string.sub(value, at, at + quantity - 1) }
    end
    from = at + quantity
  end
  return nil
end

-- Tickets of a member that count, in all and of one showing.
local function held_tickets(value, wanted)
  local from, live, of_showing = 1, 0, 0
  while from <= #value do
    local _, _, showing, quantity, alive, _, _, at = struct.unpack(FIELDS, value, from + 16)
    live = live + alive
    if showing == wanted then
      of_showing = of_showing + alive
    end
    from = at + quantity
  end
  return live, of_showing
end

-- The member's value with a changed order in it.
local function put_order(value, order)
  local flags = order.state + (order.paid and PAID_FLAG or 0) + (order.returned and RETURNED_FLAG or 0)
  return string.sub(value, 1, order.from - 1) .. order.key
    .. struct.pack(FIELDS, order.seq, order.sold_at, order.showing, order.quantity, order.live,
      flags, order.changed) .. order.letters
    .. string.sub(value, order.to + 1)
end

local function hold_name(order, member)
  return string.format('%.0f', order.seq) .. ':' .. member
end
