"""The deployment that runs the load balancer: it tells HAProxy which replicas there are.

Replicas announce themselves, again every second: a front that has died and was started anew knows them a second later.
Requests do not pass through this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from serving.http.haproxy import FrontSpec, HAProxy
from serving.scratch import Scratch, socket_folder

ANNOUNCE_S = 1.0
"""Seconds between two announcements of a replica."""
_LOST_S = 15.0
"""A replica that has been silent for so long is forgotten; HAProxy's own checks notice its end much sooner."""
_SWEEP_S = 2.0
_FOLDER = "loraloom-front-"

_log = logging.getLogger(__name__)


@dataclass
class _Member:
    slot: int
    seen_at: float
    is_draining: bool = False


class Front:
    """Ray Serve's face of HAProxy."""

    async def __init__(self, spec: FrontSpec) -> None:
        self._spec = spec
        self._scratch = Scratch(socket_folder(), _FOLDER)
        self._members: dict[str, _Member] = {}
        self._lock = asyncio.Lock()  # slots are given one at a time
        self._proxy = HAProxy(spec, self._scratch.path)
        await self._proxy.wait_until_ready()
        self._sweeper = asyncio.create_task(self._sweep())

    async def announce(self, replica: str, host: str, port: int) -> bool:
        """A replica answers at ``host:port``; False if there is no slot for it now."""
        async with self._lock:
            member = self._members.get(replica)
            if member is not None:
                member.seen_at = time.monotonic()
                return True
            taken = {member.slot for member in self._members.values()}
            slot = next((slot for slot in range(1, self._spec.slots + 1) if slot not in taken), None)
            if slot is None:
                return False
            await self._proxy.fill(slot, host, port)
            self._members[replica] = _Member(slot, time.monotonic())
            _log.info("replica %s is in slot %d: %s:%d", replica, slot, host, port)
            return True

    async def drain(self, replica: str) -> None:
        """Send a replica no more requests."""
        async with self._lock:
            member = self._members.get(replica)
            if member is not None and not member.is_draining:
                member.is_draining = True
                await self._proxy.drain(member.slot)

    async def leave(self, replica: str) -> None:
        """Forget a replica that has ended."""
        async with self._lock:
            member = self._members.pop(replica, None)
            if member is not None:
                await self._proxy.empty(member.slot)

    async def members(self) -> list[str]:
        """The replicas that take requests."""
        return [replica for replica, member in self._members.items() if not member.is_draining]

    def check_health(self) -> None:
        """Called by Ray Serve, which starts a new front if this raises."""
        if not self._proxy.is_alive:
            raise RuntimeError("HAProxy has ended")

    async def _sweep(self) -> None:
        now = time.monotonic()
        while True:
            before = now
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            if now - before > _LOST_S / 2:
                continue  # it was this process that stood still, and heard of nobody
            lost = [replica for replica, member in self._members.items() if now - member.seen_at > _LOST_S]
            for replica in lost:
                _log.warning("replica %s has not been heard of for %g s", replica, _LOST_S)
                with contextlib.suppress(OSError):
                    await self.leave(replica)

    async def __del__(self) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End HAProxy, once the answers under way have gone out, and remove its folder."""
        sweeper, proxy = getattr(self, "_sweeper", None), getattr(self, "_proxy", None)
        if sweeper is not None:
            sweeper.cancel()
        if proxy is not None:
            await asyncio.to_thread(proxy.stop)
        scratch = getattr(self, "_scratch", None)
        if scratch is not None:
            scratch.close()
