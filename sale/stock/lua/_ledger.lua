-- _ledger.lua: prepended to every script that reads or writes a campaign (see scripts.py).
--
-- Guarantee: each script decides on a Redis that was verified (INV-8) and by one clock that never
-- goes back (INV-7), and appends each change as one more link of the chain (INV-5).
-- Lua does not roll back, so a script reads and decides everything first and then writes in one
-- block. It writes the stream first: XADD refuses a number that is not new, before anything else has
-- changed. It writes the head last: if head and stream differ, the block was not written completely.
--
-- KEYS of every script: head stream stock members revoked calls operations holds (one hash slot).
--
-- head: seq chain epoch clock · state opens_at closes_at recovering recovering_by · config (JSON) rules
--       (MessagePack: the settings that scripts decide by, by their names in domain/campaign.py)
--       config_seq (number of the event that gave it both) · nonce run_id replid (the Redis that was
--       last verified) · roster_rev (the roster's revision that `revoked` is at) roster_load (name of
--       its first load) · applied (number of the last event that the writer applied to PostgreSQL)
--       behind_since (clock of the oldest event that PostgreSQL may lack; '' if it lacks none) ·
--       grace_until (ms: no hold ends before it; a recovery sets it) · made (number of its `created`
--       event: an ID may be used again after its draft was deleted). Absent moments are ''.

local HEAD, STREAM, STOCK, MEMBERS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local REVOKED, CALLS, OPERATIONS = KEYS[5], KEYS[6], KEYS[7]

-- Replies for a whole call; each script lists the codes of its single answers. scripts.py has the
-- same numbers.
local OK, MISSING, UNVERIFIED, STALE, BROKEN, LATE, EXISTS, WRONG_STATE, MISMATCH, REPLAYED, INVALID, UNCHECKED =
  0, -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11
local DUE, NOT_FOUND = -12, -13

local function read_head()
  local f = redis.call('HMGET', HEAD, 'seq', 'chain', 'epoch', 'clock', 'state', 'opens_at',
    'closes_at', 'recovering', 'rules', 'config_seq', 'nonce', 'run_id', 'replid', 'roster_rev',
    'applied', 'behind_since', 'grace_until')
  if not f[1] then
    return nil
  end
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local clock = tonumber(f[4])
  if now < clock then
    now = clock
  end
  return {
    seq = tonumber(f[1]), chain = f[2], epoch = tonumber(f[3]), epoch_text = f[3], now = now,
    state = f[5], opens_at = tonumber(f[6]), closes_at = tonumber(f[7]), recovering = f[8],
    rules = f[9], config_seq = tonumber(f[10]), nonce = f[11], run_id = f[12], replid = f[13],
    roster_rev = tonumber(f[14]), applied = tonumber(f[15]) or 0, behind_since = tonumber(f[16]),
    grace_until = tonumber(f[17]),
  }
end

-- The identity of this Redis process and of its data set.
local function identity()
  local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local replid = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
  return run_id, replid
end

-- Gives nil if the head can be trusted, else the reply that says why not. `checked` and `seen` are the
-- mark of a process that answers members (nil for any other caller): the incarnation
-- (run_id:replid:epoch) in which it checked that everything that it acknowledged is there, and the
-- highest number that it has seen. A head with a lower number has lost events (INV-8).
local function check_trusted(head, nonce, checked, seen)
  -- Searches INFO for the ID itself. A pattern is tried at every place of the text: it cost 36,000 of
  -- a call's 395,000 instructions.
  if head.nonce ~= nonce or not head.run_id or not head.replid
    or not string.find(redis.call('INFO', 'server'), 'run_id:' .. head.run_id .. '\r', 1, true)
    or not string.find(redis.call('INFO', 'replication'),
      'master_replid:' .. head.replid .. '\r', 1, true) then
    return UNVERIFIED
  end
  if checked and checked ~= head.run_id .. ':' .. head.replid .. ':' .. head.epoch_text then
    return UNCHECKED
  end
  if seen and head.seq < seen then
    return STALE
  end
  local last = redis.call('XREVRANGE', STREAM, '+', '-', 'COUNT', 1)[1]
  if not last or last[1] ~= head.seq .. '-0' then
    return BROKEN
  end
  return nil
end

local function json_ms(moment)
  return moment and string.format('%.0f', moment) or 'null'
end

-- Applies what the clock alone has changed since the last call: adds the events, sets the state.
local function apply_clock(head, events)
  if head.recovering then
    return
  end
  if head.state == 'scheduled' and head.opens_at and head.now >= head.opens_at then
    head.state = 'open'
    events[#events + 1] = '["opened",{"actor":"clock"}]'
  end
  if head.closes_at and head.now >= head.closes_at
    and (head.state == 'open' or head.state == 'paused' or head.state == 'scheduled') then
    head.state = 'closed'
    events[#events + 1] = '["closed",{"actor":"clock"}]'
  end
end

-- Appends a JSON array of `count` events as one entry: the first write of every script. `advance` is
-- the last. Scripts return the new number and chain hash: the caller's mark (sale/stock/mark.py).
local function append_text(head, count, payload)
  head.caught_up = (head.applied or 0) >= head.seq
  -- Each number is converted once: a conversion to text costs 2,000 to 3,000 instructions.
  head.clock, head.last = string.format('%.0f', head.now), string.format('%.0f', head.seq + count)
  local epoch = head.epoch_text or head.epoch
  head.chain = redis.sha1hex(table.concat({ head.chain, head.seq + 1, head.clock, epoch, payload }, '|'))
  redis.call('XADD', STREAM, head.last .. '-0', 'n', count, 't', head.clock, 'e', epoch,
    'h', head.chain, 'd', payload)
  head.seq = head.seq + count
end

local function append(head, events)
  append_text(head, #events, '[' .. table.concat(events, ',') .. ']')
end

-- Moves the head to the appended entry: the last write of every script that appends. If Redis loads a
-- torn or hand-edited file that holds only a part of a script's writes, stream and head differ, and
-- nothing is sold.
local function advance(head)
  if head.caught_up then
    redis.call('HSET', HEAD, 'behind_since', head.clock)
  end
  redis.call('HSET', HEAD, 'seq', head.last, 'chain', head.chain,
    'clock', head.clock, 'state', head.state,
    'opens_at', head.opens_at and string.format('%.0f', head.opens_at) or '',
    'closes_at', head.closes_at and string.format('%.0f', head.closes_at) or '')
end

-- Gives the answer to an operator's call that was done before, else nil. INV-4 for operators.
local function replay(op, content)
  local done = redis.call('HGET', OPERATIONS, op)
  if not done then
    return nil
  end
  local seq, before = string.match(done, '^(%d+):(.*)$')
  return { before == content and REPLAYED or MISMATCH, tonumber(seq) }
end
