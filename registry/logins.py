"""Addresses without who logs in there: what people are shown must not hold a password."""

import re

# With a password, or for HTTP what may be a token. The name of a database's user helps who has to mend it; in their
# passwords SQLAlchemy takes a slash as it is.
LOGIN = re.compile(r"(\bhttps?://)[^/\s]*@|(\b(?!https?:)[A-Za-z][A-Za-z0-9+.-]*://)(?=[^/\s:@]*:)\S*@")
PARAMETER = re.compile(r"([?&](?:password|passwd|sslpassword|token)=)[^&\s]+", re.IGNORECASE)


def without_logins(text: str) -> str:
    """The text with *** for the login of every address in it.

    >>> without_logins("postgresql://foldin:p@ss@db/foldin is away")
    'postgresql://***@db/foldin is away'
    >>> without_logins("postgresql+psycopg://foldin:ab/cd@db/foldin, or with ?user=x&password=secret&z=1")
    'postgresql+psycopg://***@db/foldin, or with ?user=x&password=***&z=1'
    >>> without_logins("https://token@host:5000/api or postgresql://foldin@db/foldin")
    'https://***@host:5000/api or postgresql://foldin@db/foldin'
    """
    hidden = LOGIN.sub(lambda found: f"{found[1] or found[2]}***@", text)
    return PARAMETER.sub(r"\1***", hidden)
