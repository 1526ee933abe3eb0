"""Private APIs of Streamlit.

Without them, the page would be open to this machine's other addresses, and an external server would learn its public one.
"""

from streamlit import net_util


def keep_to_this_machine() -> None:
    """Gives Streamlit (1.67) the addresses from which it accepts pages. By default, it takes all addresses of this machine, and asks
    an external server, unencrypted, for the public one.
    """
    net_util._external_ip = net_util._internal_ip = "127.0.0.1"
