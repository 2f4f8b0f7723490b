"""Tables as text: in a terminal, as Markdown and as a page of HTML."""
