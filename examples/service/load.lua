-- What wrk sends and counts for load.py. Arguments: the file with the body, what a right answer contains, and
-- the number of answers after which to stop.

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  wrk.body = io.open(args[1]):read("*a")
  right, most = args[2], tonumber(args[3])
  answers, server_errors, wrong = 0, 0, 0
end

function response(status, headers, body)
  answers = answers + 1
  if status >= 500 then
    server_errors = server_errors + 1
  elseif status ~= 200 or not body:find(right, 1, true) then
    wrong = wrong + 1
  end
  if answers == most then
    wrk.thread:stop()
  end
end

function done(summary, latency)
  local thread, errors = threads[1], summary.errors
  print(string.format(
    '{"seconds": %g, "answers": %d, "server_errors": %d, "wrong": %d, "connection_errors": %d, "p50": %g, "p99": %g}',
    summary.duration / 1e6, thread:get("answers"), thread:get("server_errors"), thread:get("wrong"),
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
