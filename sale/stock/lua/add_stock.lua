-- add_stock.lua: adds tickets to a showing, while it sells.
--
-- Guarantee: it adds a delta and never sets a total, so that concurrent sales count (INV-1), and adds
-- once for each key (INV-4).
--
-- ARGV   op · content hash · actor (JSON string) · reason (JSON string or null) · nonce ·
--        showing number · tickets to add · most that a showing may have
-- Reply  {0, event number, state, chain hash, tickets, left} · {INVALID} (showing or total) ·
--        {WRONG_STATE, event number, state} · {REPLAYED or MISMATCH, event number, state, '', tickets, left} ·
--        {MISSING} {UNVERIFIED} {BROKEN}
-- Idempotency  by op. Cost: constant.

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[5])
if refusal then
  return { refusal }
end
local showing, add = ARGV[6], tonumber(ARGV[7])
local stock = redis.call('HMGET', STOCK, 't' .. showing, 'r' .. showing)
local done = replay(ARGV[1], ARGV[2])
if done then
  done[3], done[4] = head.state, ''
  done[5], done[6] = tonumber(stock[1]) or 0, tonumber(stock[2]) or 0
  return done
end
local events = {}
apply_clock(head, events)
if head.recovering or head.state == 'deleted' then
  return { WRONG_STATE, head.seq, head.recovering and 'recovering' or head.state }
end
if not stock[1] or add < 1 or tonumber(stock[1]) + add > tonumber(ARGV[8]) then
  return { INVALID, head.seq, head.state }
end
events[#events + 1] = '["stock_added",{"actor":' .. ARGV[3] .. ',"reason":' .. ARGV[4]
  .. ',"op":"' .. ARGV[1] .. '","content":"' .. ARGV[2] .. '","showing":' .. showing
  .. ',"add":' .. string.format('%.0f', add) .. '}]'

append(head, events)
local tickets = redis.call('HINCRBY', STOCK, 't' .. showing, add)
local left = redis.call('HINCRBY', STOCK, 'r' .. showing, add)
redis.call('HSET', OPERATIONS, ARGV[1], head.seq .. ':' .. ARGV[2])
advance(head)
return { OK, head.seq, head.state, head.chain, tickets, left }
