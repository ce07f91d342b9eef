"""What is wrong with a Redis that does not do what it is asked: told to operators as what it is."""

from __future__ import annotations

import asyncio
import re
import ssl
from typing import NamedTuple

from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    ConnectionError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TimeoutError,
)

_LONGEST = 200  # characters of a message of Redis that the log repeats

FAULTS = (RedisError, RedisClusterException, OSError, asyncio.TimeoutError)  # what calls of redis-py raise


class BadReply(RedisError):
    """A reply that does not fit the command: what answers is no Redis, or answers to something else."""


class TooFewReplicas(RedisError):
    """Fewer replicas than wanted have confirmed a write."""


class Fault(NamedTuple):
    """A kind of failure of the store."""

    reason: str  # the metric's label
    told: str  # what the log says
    lasts: bool = False  # whether the settings, or those of the store, have to be changed first


AWAY = Fault("away", "it cannot be reached")
TIMEOUT = Fault("timeout", "it does not answer in time (--store-timeout-seconds)")
BAD_REPLY = Fault("bad-reply", "what it answers is not an answer to what it was asked: is it a Redis?", True)
TLS = Fault("tls", "TLS fails", True)
WRONG_PASSWORD = Fault("wrong-password", "it rejects the user or the password of --store, or requires one", True)
NO_PERMISSION = Fault("no-permission", "its user lacks a command or keys that docs/how-to/deployment.md lists", True)
UNKNOWN_DATABASE = Fault("unknown-database", "it has no database of the number in --store", True)
READ_ONLY = Fault("read-only", "it is a replica, which takes no writes: name its primary", True)
OUT_OF_MEMORY = Fault("out-of-memory", "it is out of memory: raise its maxmemory, or delete sessions")
CANNOT_PERSIST = Fault("cannot-persist", "it cannot write to its disk, and takes no writes until it can")
TOO_FEW_REPLICAS = Fault("too-few-replicas", "fewer replicas than --store-replicas have confirmed the write")
LOADING = Fault("loading", "it is still loading its data")
WRONG_MODE = Fault("cluster-mode", "it is one of a cluster and --store is not redis+cluster://, or the reverse", True)
CLUSTER_DOWN = Fault("cluster-down", "a part of the cluster is down")
OTHER = Fault("other", "it refuses")

KINDS = (AWAY, TIMEOUT, BAD_REPLY, TLS, WRONG_PASSWORD, NO_PERMISSION, UNKNOWN_DATABASE, READ_ONLY, OUT_OF_MEMORY,
         CANNOT_PERSIST, TOO_FEW_REPLICAS, LOADING, WRONG_MODE, CLUSTER_DOWN, OTHER)  # fmt: skip

# By what redis-py raises, or else by a part of the message: errors that a script runs into are wrapped in another one,
# differently by version of Redis. In order: the first that fits counts.
_SIGNS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, Fault], ...] = (
    ((BadReply, InvalidResponse), "Protocol Error", BAD_REPLY),
    (TooFewReplicas, r"\bNOREPLICAS\b", TOO_FEW_REPLICAS),
    (OutOfMemoryError, r"\bOOM\b", OUT_OF_MEMORY),
    (ReadOnlyError, r"\bREADONLY\b|read only replica", READ_ONLY),
    (NoPermissionError, r"\bNOPERM\b|can't run this command|ACL failure", NO_PERMISSION),
    ((AuthenticationError, AuthenticationWrongNumberOfArgsError), r"\bWRONGPASS\b|\bNOAUTH\b", WRONG_PASSWORD),
    (BusyLoadingError, "is loading the dataset", LOADING),
    ((MovedError, ClusterCrossSlotError), "Cluster mode is not enabled|cluster support disabled", WRONG_MODE),
    ((ClusterDownError, RedisClusterException), r"\bCLUSTERDOWN\b", CLUSTER_DOWN),
    ((), "DB index is out of range|invalid DB index|Invalid Database|SELECT is not allowed", UNKNOWN_DATABASE),
    ((), r"\bMISCONF\b", CANNOT_PERSIST),
    ((TimeoutError, asyncio.TimeoutError), "^Timeout", TIMEOUT),
)


def fault_of(error: BaseException) -> Fault:
    """Returns what is wrong, with details that neither hold a session's id nor come from its client."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return TLS._replace(told=f"{TLS.told}: {getattr(cause, 'verify_message', '') or cause.reason}")
        cause = cause.__cause__ or cause.__context__
    message = str(error)
    for kinds, words, fault in _SIGNS:
        if isinstance(error, kinds) or re.search(words, message):
            command = re.search(r"run the '([\w|-]+)' command", message)
            return fault._replace(told=f"{fault.told}: {command[1]}") if command else fault
    if isinstance(error, ConnectionError | OSError):
        return AWAY._replace(told=f"{AWAY.told}: {message or type(error).__name__}")
    # The name of a key would tell a session's id.
    return OTHER._replace(told=f"{OTHER.told}: {re.sub(r'cellserve:.*', '...', message)[:_LONGEST]}")
