-- purchase.lua: decides up to 256 purchases of one campaign, appends the sold ones, answers each.
--
-- Guarantee: INV-1 (a showing's tickets), INV-2 (a member's limit), INV-4 (one key, one order),
-- INV-7 (the window, to the millisecond), INV-9 (revoked members and unions), each decided here and
-- nowhere else. Order of refusals: revoked, union, same key, state, limit, stock.
--
-- ARGV   process · call number · incarnation in which this process checked what it acknowledged ·
--        event number that it has seen · nonce · how many events and how many ms PostgreSQL may be
--        behind · the purchases (MessagePack): {members (their numbers as text, because each
--        conversion of a number to text costs time), unions, showing numbers, quantities,
--        key hashes (16 hex)}
-- Reply  {0, now ms, seq, chain hash, epoch, price_fen, event number before the first sale, number of
--         the event that gave the configuration, pay_before of what is sold here (ms, 0: confirmed),
--         then one integer a purchase: not negative: sold, under the next number, and this many
--         tickets are left to the member; negative: minus the place (from 0) in this reply of
--         code, a, b, c}
--          2 replayed      a = event number  b = tickets the member may still buy  c = sold at, ms
--          3 replayed, of an order that is held or was changed since
--                          a = its record  b = as above  c = pay_before, ms, 0 where it is not held
--         -1 member revoked  -2 union not eligible  -3 same key, other content
--         -4 not open (a = opens at, ms or 0)  -5 paused  -6 closed  -7 recovering  -8 draft
--         -9 over the limit (a = tickets the member may still buy)
--        -10 not enough left (a = tickets left, b = tickets of the showing in holds, c = when the next
--            hold of the campaign ends, ms, 0: none)
--        -11 no such quantity  -12 PostgreSQL is too far behind  -13 50 orders in this campaign
--        or {code} for the whole call: MISSING UNVERIFIED UNCHECKED STALE BROKEN LATE, or DUE: a
--        purchase would be refused while holds are due; run expire.lua and call again
-- Idempotency  a call number that is not above the process's last one is refused (LATE), so a
--        delayed first attempt cannot sell after its retry was answered; the script finds the same
--        purchase in a later call by its key.
-- Cost   does not grow with the number of tickets sold.
-- Shape  µs a purchase, Redis + client, at 1, 32 and 256 a call (the least of 12 rounds on a shared
--        machine, where tenths are noise; python tests/measure_scripts.py):
--          MessagePack columns, an integer a sale (this)  58.5 + 5.9   5.3 + 0.3   3.2 + 0.1
--          MessagePack rows                               58.1 + 6.8   6.4 + 0.5   3.8 + 0.2
--          JSON columns                                   66.6 + 7.1   6.8 + 0.4   3.7 + 0.1
--          five arguments a purchase                      66.7 + 8.0   6.6 + 1.1   3.7 + 0.8
--          an array an answer                             64.3 + 6.2   7.2 + 0.5   5.1 + 0.3
--          all answers as MessagePack                     71.6 + 5.8   5.2 + 0.4   4.9 + 0.2
--        Single arguments cost the client most, and answers as arrays cost Redis most. JSON is as
--        fast as this.
-- An order is sold as confirmed or, if the campaign is paid online, as held until now + hold_s.

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[5], ARGV[3], tonumber(ARGV[4]))
if refusal then
  return { refusal }
end
if not head.roster_rev then
  return { UNVERIFIED }
end
local call = tonumber(ARGV[2])
local last_call = redis.call('HGET', CALLS, ARGV[1])
if call <= tonumber(last_call or 0) then
  return { LATE }
end

local PROCESSES_MAX, ORDERS_MAX = 1000, 50
local RESULTS = 9 -- values of the reply before the results
local SOLD, REPLAYED_ORDER, REPLAYED_CHANGED = 1, 2, 3
local pack, sub = struct.pack, string.sub

local members, unions, showings, quantities, keys = unpack(cmsgpack.unpack(ARGV[8]))
local purchases = #members
local records = redis.call('HMGET', MEMBERS, unpack(members))
local revoked = redis.call('SMISMEMBER', REVOKED, unpack(members))
local first_of = {} -- a member's first place in the batch: its record is kept there

local remaining = {}
local function left(showing)
  local n = remaining[showing]
  if n == nil then
    n = tonumber(redis.call('HGET', STOCK, 'r' .. showing)) or false
    remaining[showing] = n
  end
  return n
end

local crossed = {}
apply_clock(head, crossed)
local closed_by
if head.recovering then closed_by = -7
elseif head.state == 'scheduled' then closed_by = -4
elseif head.state == 'paused' then closed_by = -5
elseif head.state == 'closed' then closed_by = -6
elseif head.state ~= 'open' then closed_by = -8
elseif head.seq - head.applied >= tonumber(ARGV[6])
  or (head.seq > head.applied and head.behind_since
    and head.now - head.behind_since > tonumber(ARGV[7])) then closed_by = -12
end

local rules = cmsgpack.unpack(head.rules)
local everyone, limit, order_max = rules.unions == '*', rules.card_limit, rules.order_max
local before, after = '["sold",', '",' .. rules.price_fen .. ']'
local pay_before, flags_sold = 0, CONFIRMED
if rules.payment == 'online' then
  pay_before, flags_sold = head.now + rules.hold_s * 1000, HELD
  before, after = '["held",', '",' .. rules.price_fen .. ',' .. string.format('%.0f', pay_before) .. ']'
end
local showing_limits = rules.showing_limits
-- The part of an event and of a record that depends on showing and quantity, by both.
local in_event, in_record = {}, {}
local sales, fields, changed_stock, holds, newly_held = {}, {}, {}, {}, {}
local next_ends -- when the next hold ends, once somebody would be refused: false where there is none
local number, sold = head.seq + #crossed, 0
local reply = { OK, head.now, 0, '', head.epoch, rules.price_fen, number, head.config_seq, pay_before }
local said = RESULTS + purchases
local told_code, told_a, told_b, told_at

for i = 1, purchases do
  local member, showing, quantity, key = members[i], showings[i], quantities[i], keys[i]
  local code, a, b, c = 0, 0, 0, 0
  local first = first_of[member]
  if not first then
    first_of[member], first = i, i
  end
  if revoked[i] == 1 then
    code = -1
  elseif not everyone and not string.find(rules.unions, ',' .. unions[i] .. ',', 1, true) then
    code = -2
  else
    local orders, live, of_showing, count = records[first] or '', 0, 0, 0
    local from = 1
    while from <= #orders do
      local seq, sold_at, had_showing, had, alive, flags, changed, letters_at =
        struct.unpack(FIELDS, orders, from + 16)
      live, count = live + alive, count + 1
      if had_showing == showing then
        of_showing = of_showing + alive
      end
      if sub(orders, from, from + 15) == key then
        if had_showing ~= showing or had ~= quantity then
          code = -3
        elseif flags == CONFIRMED and changed == 0 then
          code, a, c = REPLAYED_ORDER, seq, sold_at
        else
          code, a = REPLAYED_CHANGED, sub(orders, from, letters_at + had - 1)
          if flags == HELD then
            c = tonumber(redis.call('ZSCORE', HOLDS, string.format('%.0f', seq) .. ':' .. member))
              or pay_before -- of this very call
          end
        end
      end
      from = letters_at + had
    end
    if code > 0 then
      b = limit - live
    elseif code == 0 and closed_by then
      code = closed_by
      a = code == -4 and head.opens_at or 0
    elseif code == 0 then
      local stock = left(showing)
      if not stock then
        -- The showing was checked against the configuration: its stock is lost (INV-8).
        return { BROKEN }
      elseif quantity < 1 or quantity > order_max then
        code = -11
      elseif count >= ORDERS_MAX then
        code = -13
      elseif live + quantity > limit then
        code, a = -9, limit - live
      elseif showing_limits and of_showing + quantity > showing_limits[showing + 1] then
        code, a = -9, showing_limits[showing + 1] - of_showing
      elseif stock < quantity then
        code, a = -10, stock
      else
        local terms = showing * 4294967296 + quantity
        if not in_event[terms] then
          in_event[terms] = ',' .. showing .. ',' .. quantity .. ',"'
          in_record[terms] = pack('>I6I2I2I2I1I5', head.now, showing, quantity, quantity, flags_sold, 0)
            .. string.rep('v', quantity)
        end
        number, sold = number + 1, sold + 1
        sales[sold] = member .. in_event[terms] .. key
        local record = orders .. key .. pack('>I5', number) .. in_record[terms]
        records[first] = record
        fields[2 * sold - 1], fields[2 * sold] = member, record -- of a member's two records the last one is written
        remaining[showing] = stock - quantity
        changed_stock[showing] = true
        if pay_before > 0 then
          holds[2 * sold - 1], holds[2 * sold] = pay_before, string.format('%.0f', number) .. ':' .. member
          newly_held[showing] = (newly_held[showing] or 0) + quantity
        end
        code, b = SOLD, limit - live - quantity
      end
      if (code == -9 or code == -10) and rules.payment == 'online' then
        if next_ends == nil then
          next_ends = next_hold_ends() or false
          if next_ends and next_ends <= head.now and may_expire(head) then
            return { DUE }
          end
        end
        if code == -10 then
          b = tonumber(redis.call('HGET', STOCK, 'h' .. showing)) + (newly_held[showing] or 0)
          c = next_ends or (b > 0 and pay_before or 0)
        end
      end
    end
  end
  if code == SOLD then
    reply[RESULTS + i] = b
  else
    -- In a rush, neighbours are refused for the same reason: the reply holds it once.
    if code ~= told_code or a ~= told_a or b ~= told_b or code > 0 then
      told_code, told_a, told_b, told_at = code, a, b, said
      reply[said + 1], reply[said + 2], reply[said + 3], reply[said + 4] = code, a, b, c
      said = said + 4
    end
    reply[RESULTS + i] = -told_at
  end
end

-- Writes, in one block. Nothing above has changed anything.
local count = #crossed + sold
if count > 0 then
  if sold > 0 then
    crossed[#crossed + 1] = before .. table.concat(sales, after .. ',' .. before) .. after
  end
  append_text(head, count, '[' .. table.concat(crossed, ',') .. ']')
  if sold > 0 then
    redis.call('HSET', MEMBERS, unpack(fields))
    for showing in pairs(changed_stock) do
      redis.call('HSET', STOCK, 'r' .. showing, remaining[showing])
    end
    for showing, tickets in pairs(newly_held) do
      redis.call('HINCRBY', STOCK, 'h' .. showing, tickets)
    end
    if pay_before > 0 then
      redis.call('ZADD', HOLDS, unpack(holds))
    end
  end
end
redis.call('HSET', CALLS, ARGV[1], call)
if not last_call and redis.call('HLEN', CALLS) > PROCESSES_MAX then
  -- A name begins with the moment of the process's start, in hex. Drop the oldest half.
  local processes = redis.call('HKEYS', CALLS)
  table.sort(processes)
  for i = 1, #processes - PROCESSES_MAX / 2 do
    redis.call('HDEL', CALLS, processes[i])
  end
end
if count > 0 then
  advance(head)
end
reply[3], reply[4] = head.seq, head.chain
return reply
