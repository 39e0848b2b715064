"""Addresses without who logs in there: what people are shown must not hold a password."""

import re

# With a password, or for HTTP what may be a token. The name of a database's user helps who has to mend it.
LOGIN = re.compile(r"(\bhttps?://|\b[A-Za-z][A-Za-z0-9+.-]*://(?=[^/\s:@]*:))[^/\s]*@")


def without_logins(text: str) -> str:
    """The text with *** for the login of every address in it.

    >>> without_logins("postgresql://foldin:p@ss@db/foldin is away")
    'postgresql://***@db/foldin is away'
    >>> without_logins("https://token@host:5000/api or postgresql://foldin@db/foldin")
    'https://***@host:5000/api or postgresql://foldin@db/foldin'
    """
    return LOGIN.sub(r"\1***@", text)
