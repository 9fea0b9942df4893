-- buy.lua: one purchase, as most ticket sales on Redis decide it. Used by every peer that sells.
--
-- Guarantee: never more than the stock, never more than a card's limit; the order stands in the
-- stream when the script has run. No chain, no idempotent replay, no window, no revocation.
--
-- KEYS   stock (a number) · tickets by card (a hash) · orders (a stream)
-- ARGV   card · quantity · limit · key · showing · ticket code
-- Reply  {1, order id, tickets the card may still buy} sold · {0, tickets left} sold out
--        {-1, tickets the card may still buy} over the limit · {-2} no such campaign

local left = tonumber(redis.call('GET', KEYS[1]))
if not left then
  return { -2 }
end
local quantity = tonumber(ARGV[2])
local may = tonumber(ARGV[3]) - tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0)
if quantity > may then
  return { -1, may }
end
if quantity > left then
  return { 0, left }
end
redis.call('DECRBY', KEYS[1], quantity)
redis.call('HINCRBY', KEYS[2], ARGV[1], quantity)
local order = redis.call('XADD', KEYS[3], '*',
  'card', ARGV[1], 'quantity', quantity, 'showing', ARGV[5], 'key', ARGV[4], 'code', ARGV[6])
return { 1, order, may - quantity }
