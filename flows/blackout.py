"""Hours in which a line folds nothing by itself, such as "Mon-Fri 08:00-18:00" or "22:00-06:00"."""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
WINDOW = re.compile(r"(?:(?P<days>[a-z,-]+) +)?(?P<begin>\d\d:\d\d)-(?P<end>\d\d:\d\d)")
FORM = "days and hours such as 'Mon-Fri 08:00-18:00', 'Sat,Sun 00:00-24:00' or '22:00-06:00'"


class Window(NamedTuple):
    """Some hours on some days of the week."""

    days: frozenset[int]  # on which it begins; Monday is 0
    begin: int  # minutes after midnight
    end: int  # the same; not after `begin`, it is of the next day


def window_of(text: str) -> Window:
    """The window that a text describes; every day where it names none.

    Raises:
        ValueError: the text describes none.
    """
    found = WINDOW.fullmatch(text.strip().lower())
    if not found:
        raise ValueError(text)
    days = frozenset(day for part in (found["days"] or "mon-sun").split(",") for day in _days(part))
    begin, end = (_minutes(found[name]) for name in ("begin", "end"))
    if begin == 24 * 60:
        raise ValueError(text)
    return Window(days, begin, end)


def blackout_at(now: datetime, windows: Iterable[str]) -> str:
    """The first window that a time lies in; "" when it lies in none. The time is in the line's time zone."""
    return next((text for text in windows if _holds(window_of(text), now)), "")


def blackout_now(windows: Iterable[str], timezone: str) -> str:
    """The same for this moment, in a time zone."""
    return blackout_at(datetime.now(ZoneInfo(timezone)), windows) if windows else ""


def _holds(window: Window, now: datetime) -> bool:
    minute, today, yesterday = now.hour * 60 + now.minute, now.weekday(), (now - timedelta(days=1)).weekday()
    if window.begin < window.end:
        return today in window.days and window.begin <= minute < window.end
    return (today in window.days and minute >= window.begin) or (yesterday in window.days and minute < window.end)


def _days(text: str) -> Iterable[int]:
    """The days of "mon" or "fri-mon"."""
    first, _, last = text.partition("-")
    begin, end = DAYS.index(first), DAYS.index(last or first)
    return range(begin, end + 1) if begin <= end else (*range(begin, 7), *range(end + 1))


def _minutes(text: str) -> int:
    hours, minutes = map(int, text.split(":"))
    if minutes > 59 or hours * 60 + minutes > 24 * 60:
        raise ValueError(text)
    return hours * 60 + minutes
