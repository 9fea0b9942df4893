-- feed.lua: sends requests that were written to a file before the run, one after the other.
--
-- wrk -t1 … -s feed.lua URL -- FILE BYTES_A_REQUEST once|cycle
--
-- All requests are equally long, so that reading one costs one read of a buffered file. `once` stops
-- being honest when the file ends, so the result says whether it did; `cycle` begins anew. One thread
-- only: two would send each request twice.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  file = assert(io.open(arguments[1], 'rb'))
  size = assert(tonumber(arguments[2]))
  cycle = arguments[3] == 'cycle'
  ended = 0
end

function request()
  local raw = file:read(size)
  if not raw then
    if not cycle then
      ended = ended + 1
    end
    file:seek('set', 0)
    raw = file:read(size)
  end
  return raw
end

function done(summary, latency)
  local ended = 0
  for _, thread in ipairs(threads) do
    ended = ended + thread:get('ended')
  end
  local errors = summary.errors
  io.write(string.format(
    '\nRESULT {"requests":%d,"duration_us":%d,"refused":%d,"lost":%d,"ended":%d,'
      .. '"p50_us":%d,"p95_us":%d,"p99_us":%d}\n',
    summary.requests, summary.duration, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout, ended,
    latency:percentile(50), latency:percentile(95), latency:percentile(99)))
end
