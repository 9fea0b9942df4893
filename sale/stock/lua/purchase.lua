-- purchase.lua: decides up to 256 purchases of one campaign, appends the sold ones, answers each.
--
-- Guarantee: INV-1 (a showing's tickets), INV-2 (a card's limit), INV-4 (one key, one order),
-- INV-7 (the window, to the millisecond), INV-9 (revoked cards and unions), each decided here and
-- nowhere else. Order of refusals: card, union, same key, state, limit, stock.
--
-- ARGV   process · call number · incarnation that this process has attended and event number that
--        it has seen since · nonce · how many events and how many ms PostgreSQL may be behind ·
--        then for each purchase: card · union · showing number · quantity · key hash (16 hex)
-- Reply  {0, now ms, seq, epoch, price_fen, then four integers a purchase: code, a, b, c}
--          1 sold          a = event number  b = tickets the card may still buy
--          2 replayed      a = event number  b = tickets the card may still buy  c = sold at, ms
--         -1 card revoked  -2 union not eligible  -3 same key, other content
--         -4 not open (a = opens at, ms or 0)  -5 paused  -6 closed  -7 recovering  -8 draft
--         -9 over the limit (a = tickets the card may still buy)
--        -10 not enough left (a = tickets left)  -11 no such quantity
--        -12 PostgreSQL is too far behind
--        or {code} for the whole call: MISSING UNVERIFIED UNATTENDED STALE BROKEN LATE
-- Idempotency  a call number that is not above the process's last one is refused (LATE), so a
--        delayed first attempt cannot sell after its retry was answered; the same purchase in a
--        later call is found by its key.
-- Cost   8 to 18 µs of Redis' CPU a sold purchase in the benchmark, at about 127 a call; does not
--        grow with what is already sold.
--
-- A card's value is one record of 31 bytes an order: key hash (16), event number (5), sold at, ms
-- (6), showing number (2), quantity (2).

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = distrust(head, ARGV[5], ARGV[3], tonumber(ARGV[4]))
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

local RECORD, FIELDS = 31, '>I5I6I2I2'
local PROCESSES_MAX = 1000
local first_argument, purchases = 8, (#ARGV - 7) / 5

local cards = {}
for i = 0, purchases - 1 do
  cards[i + 1] = ARGV[first_argument + i * 5]
end
local records = redis.call('HMGET', CARDS, unpack(cards))
local revoked = redis.call('SMISMEMBER', REVOKED, unpack(cards))
local record_of = {}
for i = 1, purchases do
  record_of[cards[i]] = records[i] or ''
end

local remaining = {}
local function left(showing)
  local n = remaining[showing]
  if n == nil then
    n = tonumber(redis.call('HGET', STOCK, 'r' .. showing)) or false
    remaining[showing] = n
  end
  return n
end

local events = {}
cross(head, events)
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

local everyone, limit, order_max = head.unions == '*', head.card_limit, head.order_max
local tail = ',' .. head.price_fen .. ']'
local changed, changed_stock = {}, {}
local reply = { OK, head.now, 0, head.epoch, tonumber(head.price_fen) }
local at = 5

for i = 1, purchases do
  local base = first_argument + (i - 1) * 5
  local card, showing, quantity, key = cards[i], ARGV[base + 2], tonumber(ARGV[base + 3]), ARGV[base + 4]
  local code, a, b, c = 0, 0, 0, 0
  if revoked[i] == 1 then
    code = -1
  elseif not everyone and not string.find(head.unions, ',' .. ARGV[base + 1] .. ',', 1, true) then
    code = -2
  else
    local orders, live = record_of[card], 0
    for from = 1, #orders, RECORD do
      local seq, sold_at, had_showing, had = struct.unpack(FIELDS, orders, from + 16)
      live = live + had
      if string.sub(orders, from, from + 15) == key then
        if tostring(had_showing) == showing and had == quantity then
          code, a, c = 2, seq, sold_at
        else
          code = -3
        end
      end
    end
    if code == 2 then
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
      elseif live + quantity > limit then
        code, a = -9, limit - live
      elseif stock < quantity then
        code, a = -10, stock
      else
        events[#events + 1] = '["sold","' .. card .. '",' .. showing .. ',' .. quantity .. ',"'
          .. key .. '"' .. tail
        local seq = head.seq + #events
        record_of[card] = orders .. key
          .. struct.pack(FIELDS, seq, head.now, tonumber(showing), quantity)
        changed[card] = true
        remaining[showing] = stock - quantity
        changed_stock[showing] = true
        code, a, b = 1, seq, limit - live - quantity
      end
    end
  end
  reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4] = code, a, b, c
  at = at + 4
end

-- Writes, in one block. Nothing above has changed anything.
if #events > 0 then
  append(head, events)
  local fields, n = {}, 0
  for card in pairs(changed) do
    fields[n + 1], fields[n + 2] = card, record_of[card]
    n = n + 2
  end
  if n > 0 then
    redis.call('HSET', CARDS, unpack(fields))
    for showing in pairs(changed_stock) do
      redis.call('HSET', STOCK, 'r' .. showing, remaining[showing])
    end
  end
end
redis.call('HSET', CALLS, ARGV[1], call)
if not last_call and redis.call('HLEN', CALLS) > PROCESSES_MAX then
  -- Names begin with the moment of the process's start, in hex: the oldest go.
  local processes = redis.call('HKEYS', CALLS)
  table.sort(processes)
  for i = 1, #processes - PROCESSES_MAX / 2 do
    redis.call('HDEL', CALLS, processes[i])
  end
end
if #events > 0 then
  advance(head)
end
reply[3] = head.seq
return reply
