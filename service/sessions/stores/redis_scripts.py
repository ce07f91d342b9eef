"""The scripts that Redis runs: each changes a session, or the index of all sessions, as a whole or not at all.

A session is two keys that share a hash tag: a hash, and a string that outlives it and becomes its tombstone. The index
is a sorted set of all sessions by deadline, and for each owner one of their sessions by the order of creation; for each
client (an owner, or without keys an address) one of the sessions that it made, by deadline, and a hash has the bytes of
their states. All its keys share a hash tag, so that a cluster keeps them on one node. Deadlines are by Redis's clock.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

INDEX = "cellserve:sessions"
_PURGED = 1000  # expired sessions that one call removes from the index, at most
_SCANNED = 1000  # sessions of an owner that one call looks at, at most

# KEYS: of one or several sessions, the session and its tombstone. ARGV: milliseconds until the sessions expire and
# until the tombstones do, and how many they have left before these are set again (it is a fifth of the time); then of
# each session the expected stamp, the new stamp, the tombstone, the states, and the stored answer, empty if it does not
# change. Returns the outcome of each session.
WRITE = b"""
local call, pcall, outcomes = redis.call, redis.pcall, {}
local most, least = tonumber(ARGV[1]), tonumber(ARGV[3])
for place = 1, #KEYS / 2 do
  local session, at = KEYS[2 * place - 1], 5 * place - 1
  local mark = pcall('HGET', session, 'mark')
  if not mark then
    outcomes[place] = 'gone'
  elseif mark ~= ARGV[at] then
    outcomes[place] = 'other'
  else
    if ARGV[at + 4] ~= '' then
      call('HSET', session, 'mark', ARGV[at + 1], 'states', ARGV[at + 3], 'last', ARGV[at + 4])
    else
      call('HSET', session, 'mark', ARGV[at + 1], 'states', ARGV[at + 3])
    end
    local left = call('PTTL', session)
    if left < least or left > most then
      call('PEXPIRE', session, ARGV[1])
      call('SET', KEYS[2 * place], ARGV[at + 2], 'PX', ARGV[2])
    else
      call('SET', KEYS[2 * place], ARGV[at + 2], 'XX', 'KEEPTTL')
    end
    outcomes[place] = 'written'
  end
end
return table.concat(outcomes, ' ')
"""
# KEYS: the session, its tombstone. ARGV: the two times, the tombstone, then fields and values.
CREATE = b"""
if redis.call('EXISTS', KEYS[1]) == 1 then return 'there' end
if redis.call('EXISTS', KEYS[2]) == 1 then return 'gone' end
local fields = {}
for place = 4, #ARGV do fields[place - 3] = ARGV[place] end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
return 'written'
"""
# The same, replacing a session or tombstone.
REPLACE = b"redis.call('DEL', KEYS[1], KEYS[2])\n" + CREATE
# KEYS: as above. ARGV: the reason, milliseconds until the tombstone expires, the expected position or nothing. What
# stands under the session's name need not be a session.
END = b"""
local mark = redis.pcall('HGET', KEYS[1], 'mark')
if not mark and redis.call('EXISTS', KEYS[1]) == 0 then return 'gone' end
local position = type(mark) == 'string' and string.match(mark, '^(%d+) ')
if position and #position > 18 then position = nil end
if ARGV[3] ~= '' and ARGV[3] ~= position then return 'other' end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. (position or '0'), 'PX', ARGV[2])
return 'written'
"""

_OF_INDEX = b"""
local index, base = KEYS[1], 'cellserve:{' .. KEYS[1] .. '}:'
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local function of_owner(key)
  return base .. 'of:' .. (string.match(key, '^([^/]*)/') or '')
end
local function of_client(client)
  return base .. 'by:' .. client
end
local function client_of(key)
  local told = redis.call('HGET', base .. 'clients', key)
  if told then return string.match(told, '^(%%d+) (.*)$') end
end
local function put(key, seconds)
  redis.call('ZADD', index, now + seconds, key)
  local size, client = client_of(key)
  if client then redis.call('ZADD', of_client(client), now + seconds, key) end
  if not redis.call('ZSCORE', of_owner(key), key) then
    redis.call('ZADD', of_owner(key), redis.call('INCR', base .. 'next'), key)
  end
end
local function drop(key)
  local size, client = client_of(key)
  if client then
    redis.call('ZREM', of_client(client), key)
    redis.call('HDEL', base .. 'clients', key)
    -- Not -size, which is '-0' where there are no states.
    local left = redis.call('HINCRBY', base .. 'bytes', client, 0 - size)
    if left <= 0 then redis.call('HDEL', base .. 'bytes', client) end
  end
  redis.call('ZREM', of_owner(key), key)
  redis.call('ZREM', index, key)
end
local function lives(key)
  local deadline = redis.call('ZSCORE', index, key)
  return deadline and tonumber(deadline) > now
end
local function purge()
  local expired = redis.call('ZRANGEBYSCORE', index, '-inf', now, 'LIMIT', 0, %d)
  for _, key in ipairs(expired) do drop(key) end
  return #expired
end
local function count(of)
  return redis.call('ZCOUNT', of or index, '(' .. now, '+inf')
end
""" % (_PURGED,)
# KEYS: the index. ARGV: a session, seconds until its deadline, how many sessions there may be, its client, the bytes of
# its states, and how many sessions and bytes the client may have. Returns 1 if it is in the index now, 0 if there are
# too many, 2 if there are too many of the client's; and how many expired ones have been removed.
ADMIT = (
    _OF_INDEX
    + b"""
local expired = purge()
if not lives(ARGV[1]) then
  drop(ARGV[1])
  local bytes = redis.call('HGET', base .. 'bytes', ARGV[4]) or 0
  if count(of_client(ARGV[4])) >= tonumber(ARGV[6]) or bytes + ARGV[5] > tonumber(ARGV[7]) then return {2, expired} end
  if count() >= tonumber(ARGV[3]) then return {0, expired} end
  redis.call('HSET', base .. 'clients', ARGV[1], ARGV[5] .. ' ' .. ARGV[4])
  redis.call('HINCRBY', base .. 'bytes', ARGV[4], ARGV[5])
end
put(ARGV[1], ARGV[2])
return {1, expired}
"""
)
# KEYS: the index. ARGV: seconds until the deadline, 'XX' to leave out sessions that are not in the index, sessions.
TOUCH = (
    _OF_INDEX
    + b"""
for place = 3, #ARGV do
  if ARGV[2] ~= 'XX' or lives(ARGV[place]) then put(ARGV[place], ARGV[1]) end
end
return #ARGV - 2
"""
)
# KEYS: the index. ARGV: a session.
DROP = (
    _OF_INDEX
    + b"""
drop(ARGV[1])
return 1
"""
)
# KEYS: the index. Returns the number of live sessions, and how many expired ones have been removed.
COUNT = (
    _OF_INDEX
    + b"""
local expired = purge()
return {count(), expired}
"""
)
# KEYS: the index. ARGV: a client, if only its sessions count. Returns the live session with the earliest deadline.
LONGEST_IDLE = (
    _OF_INDEX
    + b"""
return redis.call('ZRANGEBYSCORE', ARGV[1] and of_client(ARGV[1]) or index, '(' .. now, '+inf', 'LIMIT', 0, 1)
"""
)
# KEYS: the index. ARGV: the owner, the number of the last session before, how many. Returns live sessions, and the
# number of the last one, 0 if there are no more.
PAGE = (
    _OF_INDEX
    + b"""
local found, of, last = {}, base .. 'of:' .. ARGV[1], '0'
local listed = redis.call('ZRANGEBYSCORE', of, '(' .. ARGV[2], '+inf', 'WITHSCORES', 'LIMIT', 0, %d)
for place = 1, #listed, 2 do
  if #found == tonumber(ARGV[3]) then return {found, tonumber(last)} end
  last = listed[place + 1]
  if lives(listed[place]) then found[#found + 1] = listed[place] end
end
return {found, #listed == %d and tonumber(last) or 0}
"""
    % (_SCANNED, 2 * _SCANNED)
)

SHA1 = {
    script: hashlib.sha1(script).hexdigest()
    for script in (WRITE, CREATE, REPLACE, END, ADMIT, TOUCH, DROP, COUNT, LONGEST_IDLE, PAGE)
}


@lru_cache(16384)
def names(key: str) -> tuple[str, str]:
    """Returns the names of a session's keys in Redis."""
    return f"cellserve:{{{key}}}:session", f"cellserve:{{{key}}}:fate"
