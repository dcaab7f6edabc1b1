"""The Lua script that applies a batch in Redis: mark first by compare-and-set, then each operation protected.

The mark is the script's first write, so what Redis refuses because of itself (out of memory, read-only, no replicas, disk
errors) is refused before anything is changed, and after it Redis lets a script run to its end. A record that is refused
(wrong type of key, unknown command) leaves the others applied and is noted with its reason in a hash beside the mark, so that
a lost answer does not hide it. What is refused for lack of rights stops there, and the mark says how far it came: `41+2` means
all through 41, and two operations of what comes after.

Presence, retained values and positions are written only when what stands there is older: by (ms, gateway, epoch, seq), or by
the specification's seconds where no stamp stands. Between two values of one gateway its own order decides, so a clock that
was set back does not hide a new value.

Invariant: with the mark not where the sender expects it, nothing is changed.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

TOMBSTONE_SECONDS = 30 * 86_400
SWEPT_TOPICS = 50
"""Topics per batch whose index is freed of ids that expired."""

ENVIRONMENT = (
    "OOM", "READONLY", "MISCONF", "NOREPLICAS", "LOADING", "MASTERDOWN", "BUSY", "NOAUTH", "NOPERM", "CLUSTERDOWN",
    "TRYAGAIN", "MOVED", "ASK", "CROSSSLOT",
)  # fmt: skip
"""Error codes that say something about the server or our rights, not about the record."""
RIGHTS = ("ACL failure", "user executing the script")
"""What servers say inside a script when our user lacks a right; newer ones give no code with it."""

_MARK_FIRST = """
local ledger, refused = KEYS[1], KEYS[2]
local epoch, expected, through, refs = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local stands = redis.call('HGET', ledger, epoch) or ''
if stands == '0' then stands = '' end
if stands ~= expected then return {'moved', stands} end
redis.call('HSET', ledger, epoch, through)

"""

_OPERATIONS = """local call = redis.pcall

local function fault(reply)
  if type(reply) == 'table' then return reply.err end
end

local function newer(mine, theirs)
  local ms, gateway, age, seq = string.match(mine, '^(%d+) (%S+) (%d+) (%d+)$')
  local ms2, gateway2, age2, seq2 = string.match(theirs, '^(%d+) (%S+) (%d+) (%d+)$')
  if not ms2 then return true end
  if gateway == gateway2 then
    if age ~= age2 then return tonumber(age) > tonumber(age2) end
    return tonumber(seq) >= tonumber(seq2)
  end
  if ms ~= ms2 then return tonumber(ms) > tonumber(ms2) end
  return gateway > gateway2
end

-- whether the event of `stamp` (and second `ts`) is newer than what stands
local function fits(stampkey, stamp, key, ts, field, field2)
  local before = call('GET', stampkey)
  if type(before) == 'string' then return newer(stamp, before) end
  local times = call('HMGET', key, field, field2)
  if times.err then return true end
  for _, time in ipairs({times[1] or '', times[2] or ''}) do
    if (tonumber(time) or 0) > tonumber(ts) then return false end
  end
  return true
end

local topics, added = {}, {}
local size = {P = 9, C = 6, D = 6, R = 10, X = 5, V = 7, A = 6}
local ops = {}

function ops.P(i)
  local id, topic = ARGV[i+1], ARGV[i+4]
  local key = 'mqtt:msg:' .. id
  if not added[topic] then topics[#topics+1] = topic; added[topic] = 0 end
  added[topic] = added[topic] + 1
  return fault(call('HSET', key, 'id', id, 'from', ARGV[i+2], 'qos', ARGV[i+3], 'topic', topic, 'retain', ARGV[i+5],
      'payload', ARGV[i+6], 'ts', ARGV[i+7]))
    or fault(call('EXPIRE', key, ARGV[i+8]))
    or fault(call('ZADD', 'mqtt:msg:' .. topic, 1, id))
end

function ops.C(i)
  local cid, ts = ARGV[i+1], ARGV[i+3]
  local key = 'mqtt:client:' .. cid
  local err = ARGV[i+2] ~= '' and fault(call('HSET', 'mqtt:node:' .. ARGV[i+2], cid, ts)) or nil
  if err or not fits(ARGV[i+4], ARGV[i+5], key, ts, 'online_at', 'offline_at') then return err end
  return fault(call('HSET', key, 'state', 1, 'online_at', ts, 'offline_at', 'undefined'))
    or fault(call('SET', ARGV[i+4], ARGV[i+5]))
end

-- a going counts only at the gateway where the client came last, and leaves the time of that coming in the stamp; false if not
local function went(stampkey, stamp)
  local before = call('GET', stampkey)
  if type(before) ~= 'string' then return stamp end
  local ms, gateway = string.match(before, '^(%d+) (%S+)')
  if not ms then return stamp end
  if gateway ~= string.match(stamp, '^%d+ (%S+)') then return false end
  return ms .. string.match(stamp, '^%d+(.*)$')
end

function ops.D(i)
  local cid, ts = ARGV[i+1], ARGV[i+3]
  local key = 'mqtt:client:' .. cid
  local err = ARGV[i+2] ~= '' and fault(call('HDEL', 'mqtt:node:' .. ARGV[i+2], cid)) or nil
  local stamp = went(ARGV[i+4], ARGV[i+5])
  if err or not stamp or not fits(ARGV[i+4], stamp, key, ts, 'online_at', 'offline_at') then return err end
  return fault(call('HSET', key, 'state', 0, 'offline_at', ts)) or fault(call('SET', ARGV[i+4], stamp))
end

function ops.R(i)
  local topic, id, ts, expire = ARGV[i+1], ARGV[i+2], ARGV[i+6], ARGV[i+7]
  local key = 'mqtt:retain:' .. topic
  if not fits(ARGV[i+8], ARGV[i+9], key, ts, 'ts', 'ts') then return nil end
  local kind = call('TYPE', key)
  if (type(kind) == 'table' and kind.ok or kind) == 'string' then call('DEL', key) end
  return fault(call('HSET', key, 'id', id, 'from', ARGV[i+3], 'qos', ARGV[i+4], 'topic', topic, 'retain', 'true',
      'payload', ARGV[i+5], 'ts', ts))
    or fault(expire == '' and call('PERSIST', key) or expire ~= '' and call('EXPIRE', key, expire))
    or fault(call('SET', ARGV[i+8], ARGV[i+9]))
end

function ops.X(i)
  local key = 'mqtt:retain:' .. ARGV[i+1]
  if not fits(ARGV[i+3], ARGV[i+4], key, ARGV[i+2], 'ts', 'ts') then return nil end
  return fault(call('DEL', key)) or fault(call('SET', ARGV[i+3], ARGV[i+4], 'EX', TOMBSTONE))
end

-- whether `epoch:seq:ms` is further on in the messages of a gateway: by the time in their ids, which never goes back
local function further(mine, theirs)
  if not theirs then return true end
  local seq, ms = string.match(mine, '^%d+:(%d+):(%d+)$')
  local seq2, ms2 = string.match(theirs, '^%d+:(%d+):?(%d*)$')
  if not seq2 then return true end
  if ms2 ~= '' and ms ~= ms2 then return tonumber(ms) > tonumber(ms2) end
  return tonumber(seq) > tonumber(seq2)
end

function ops.V(i)
  local code, place, key, stamp = ARGV[i+3], ARGV[i+4], ARGV[i+5], ARGV[i+6]
  local last = call('HGET', key, 'stamp')
  if fault(last) then return fault(last) end
  if code == '' then
    if last and not newer(stamp, last) then return nil end
    return fault(call('DEL', key)) or fault(call('HSET', key, 'stamp', stamp, 'dropped', stamp))
      or fault(call('EXPIRE', key, TOMBSTONE))
  end
  local dropped = call('HGET', key, 'dropped')
  if dropped then
    if not newer(stamp, dropped) then return nil end
    call('PERSIST', key)
  end
  local err = not (last and newer(last, stamp)) and fault(call('HSET', key, 'stamp', stamp)) or nil
  return err or further(place, call('HGET', key, code)) and fault(call('HSET', key, code, place)) or nil
end

local function ours(id)
  return #id == 20 and string.match(id, '^[0-9A-Za-z]+$')
end

-- by bytes: how the server compares texts is a matter of its locale
local function below(mine, theirs)
  for j = 1, #mine do
    local a, b = string.byte(mine, j), string.byte(theirs, j)
    if a ~= b then return a < b end
  end
  return false
end

function ops.A(i)
  local key, id, stampkey, stamp = 'mqtt:acked:' .. ARGV[i+1] .. ':' .. ARGV[i+2], ARGV[i+3], ARGV[i+4], ARGV[i+5]
  local before, stands = call('GET', stampkey), call('GET', key)
  if fault(stands) then return fault(stands) end
  local is_late = type(before) == 'string' and not newer(stamp, before)
  if id == '' then
    if is_late then return nil end
    return fault(call('DEL', key)) or fault(call('SET', stampkey, stamp, 'EX', TOMBSTONE))
  end
  if stands and ours(stands) and ours(id) then
    if below(id, stands) then return nil end
  elseif is_late then
    return nil
  end
  return fault(call('SET', key, id)) or not is_late and fault(call('SET', stampkey, stamp)) or nil
end

function ops.U(i)
  return fault(call(unpack(ARGV, i + 2, i + 1 + tonumber(ARGV[i+1]))))
end

local environment = {ENVIRONMENT}
local function concerns_us(err)
  if environment[string.match(err, '^%-?(%u+)')] then return true end
  for _, text in ipairs({RIGHTS}) do
    if string.find(err, text, 1, true) then return true end
  end
  return false
end

"""

_ALL_OF_THEM = """local function reference(k)
  for ref in string.gmatch(refs, '%S+') do
    k = k - 1
    if k == 0 then return ref end
  end
end

-- the operation as it came, for the quarantine of who asks later
local function original(first, count)
  local parts = {}
  for j = first, first + count - 1 do
    parts[#parts+1] = '$' .. #ARGV[j] .. '\\r\\n' .. ARGV[j] .. '\\r\\n'
  end
  return table.concat(parts)
end

-- index entries go when their hash is gone, and only then
local function sweep(topic)
  local key = 'mqtt:msg:' .. topic
  local oldest = call('ZRANGE', key, 0, 0)
  if oldest.err or not oldest[1] or call('EXISTS', 'mqtt:msg:' .. oldest[1]) == 1 then return end
  for _, id in ipairs(call('ZRANGE', key, 0, 2 * added[topic])) do
    if call('EXISTS', 'mqtt:msg:' .. id) == 1 then return end
    call('ZREM', key, id)
  end
end

local reply, i, k, last = {'done'}, 5, 0, #ARGV
while i <= last do
  local op = ARGV[i]
  local err = ops[op](i)
  k = k + 1
  if err then
    local ref = reference(k)
    if concerns_us(err) then
      local seq, done = string.match(ref, '^(%d+):(%d+)$')
      local mark = string.format('%.0f', tonumber(seq) - 1)
      if done ~= '0' then mark = mark .. '+' .. done end
      redis.call('HSET', ledger, epoch, mark)
      return {'stopped', mark, err}
    end
    call('HSET', refused, epoch .. ':' .. ref, err .. '\\0' .. original(i, size[op] or tonumber(ARGV[i+1]) + 2))
    reply[#reply+1] = k
    reply[#reply+1] = err
  end
  i = i + (size[op] or tonumber(ARGV[i+1]) + 2)
end
for n = 1, math.min(#topics, SWEPT) do
  sweep(topics[(tonumber(through) + n) % #topics + 1])
end
return reply
"""

_THOSE_OF_A_SLOT = """
local mark, name, refs, after = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local e0, s0, n0 = string.match(redis.call('HGET', mark, name) or '', '^(%d+):(%d+):(%d+)$')
e0, s0, n0 = tonumber(e0 or 0), tonumber(s0 or 0), tonumber(n0 or 0)
local epoch = tonumber(ARGV[4])

local function is_done(seq, number)
  if epoch ~= e0 then return epoch < e0 end
  if seq ~= s0 then return seq < s0 end
  return number <= n0
end

-- the first write, so that what the server refuses because of itself is refused before anything is changed
local last = redis.call('HGET', mark, name) or '0:0:0'
redis.call('HSET', mark, name, last)

local kept, text = {}, {}
local function keep(ref, err)
  err = string.gsub(err, '\\n', ' ')
  kept[#kept+1] = ref
  kept[#kept+1] = err
  text[#text+1] = ref .. ' ' .. err .. '\\n'
end
for e, ref, err in string.gmatch(redis.call('HGET', mark, name .. '!') or '', '(%d+):(%d+:%d+) ([^\\n]*)\\n') do
  local seq = tonumber(string.match(ref, '^%d+'))
  if tonumber(e) == epoch and seq > after then keep(e .. ':' .. ref, err) end
end

local named = {}
for n = 2, #KEYS do named[KEYS[n]] = true end

-- a slot is moving away and an operation before has deleted the key: it can be made again only where the slot arrives
local function has_left(err, i)
  if not string.find(err, 'non local key', 1, true) then return false end
  if ARGV[i] ~= 'U' then return true end
  for j = i + 2, i + 1 + tonumber(ARGV[i+1]) do
    if named[ARGV[j]] then return true end
  end
  return false
end

local i, status = 5, 'done'
for ref in string.gmatch(refs, '%S+') do
  local op = ARGV[i]
  local seq, number = string.match(ref, '^(%d+):(%d+)$')
  if not is_done(tonumber(seq), tonumber(number)) then
    local err = ops[op](i)
    if err and (concerns_us(err) or has_left(err, i)) then
      status = err
      break
    end
    last = ARGV[4] .. ':' .. ref
    if err then keep(ARGV[4] .. ':' .. ref, err) end
  end
  i = i + (size[op] or tonumber(ARGV[i+1]) + 2)
end
redis.call('HSET', mark, name, last)
if #text > 0 then redis.call('HSET', mark, name .. '!', table.concat(text)) else redis.call('HDEL', mark, name .. '!') end
return {status, unpack(kept)}
"""

_FINISH = """
local ledger, refused = KEYS[1], KEYS[2]
local stands = redis.call('HGET', ledger, ARGV[1]) or ''
if stands == '0' then stands = '' end
if stands ~= ARGV[2] then return {'moved', stands} end
redis.call('HSET', ledger, ARGV[1], ARGV[3], ARGV[4], ARGV[5])
for i = 6, #ARGV, 2 do redis.call('HSET', refused, ARGV[i], ARGV[i+1]) end
return {'done'}
"""


class Script(NamedTuple):
    """A script and the name a server knows it by once it has run."""

    source: bytes
    sha: bytes


def _script(text: str) -> Script:
    text = (
        text.replace("{ENVIRONMENT}", "{" + ", ".join(f"{code} = true" for code in ENVIRONMENT) + "}")
        .replace("{RIGHTS}", "{" + ", ".join(f"'{text}'" for text in RIGHTS) + "}")
        .replace("TOMBSTONE", str(TOMBSTONE_SECONDS))
        .replace("SWEPT", str(SWEPT_TOPICS))
    )
    return Script(text.encode(), hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode())


BATCH = _script(_MARK_FIRST + _OPERATIONS + _ALL_OF_THEM)
"""A whole batch with its mark, on one server."""
SLOT = _script(_OPERATIONS + _THOSE_OF_A_SLOT)
"""Of a batch on a cluster what falls into one slot, with a mark of its own: done is skipped, the rest applied."""
FINISH = _script(_FINISH)
"""The last step of a batch on a cluster: the pool's mark by compare-and-set, and the refusals beside it."""
