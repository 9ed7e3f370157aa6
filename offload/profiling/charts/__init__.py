"""Charts as SVG inside HTML: drawn here from numbers alone, coloured by the page's style sheet."""
