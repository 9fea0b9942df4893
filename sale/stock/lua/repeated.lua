-- repeated.lua: tells whether an operator's step was done before under this key, and on which draft.
--
-- Guarantee: INV-4 for operators, also if the draft of that step was deleted: the repeat gets the
-- outcome for that draft, and never for a campaign that was created since under its ID.
--
-- ARGV   op · content hash · nonce
-- Reply  {REPLAYED or MISMATCH, event number, state, number of the campaign's creation or 0} ·
--        {0} (it was not done) · {MISSING} {UNVERIFIED} {BROKEN}
-- Idempotency  reads only. Cost: constant.

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[3])
if refusal then
  return { refusal }
end
local done = replay(ARGV[1], ARGV[2])
if not done then
  return { OK }
end
-- A head of an older version lacks `made`; its campaign counts as created once.
done[3], done[4] = head.state, tonumber(redis.call('HGET', HEAD, 'made')) or 0
return done
