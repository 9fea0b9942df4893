-- tick.lua: records an opening or closing whose moment has passed without another call.
--
-- ARGV   nonce
-- Reply  {0, event number, state, chain hash, events recorded} · {MISSING} {UNVERIFIED} {BROKEN}
-- Idempotency  a moment is crossed once. Cost: constant.

local head = read_head()
if not head then
  return { MISSING }
end
local refusal = check_trusted(head, ARGV[1])
if refusal then
  return { refusal }
end
local events = {}
apply_clock(head, events)
if #events > 0 then
  append(head, events)
  advance(head)
end
return { OK, head.seq, head.recovering and 'recovering' or head.state, head.chain, #events }
