"""Settings of the docs site; `docs/build.py` writes its pages and calls Sphinx."""

from configparser import ConfigParser
from pathlib import Path

house = ConfigParser(delimiters=["="], interpolation=None)
house.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
house = house["DEFAULT"]

project, version, copyright = house["title"], house["version"], house["copyright"]
html_title = f"{project} {version}"
language = "en"

extensions = ["myst_nb", "sphinx_copybutton"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # would be fetched, which a browser refuses on file://
html_theme_options = {"top_of_page_buttons": []}
pygments_style, pygments_dark_style = "default", "github-dark"

# the notebooks' stored outputs are shown; nothing runs here
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = "imports"  # the only cells that are folded
nb_ipywidgets_js = {}  # would come from a CDN

myst_enable_extensions = ["colon_fence", "strikethrough"]  # no dollarmath: a dollar is a dollar
myst_heading_anchors = 4
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88
copybutton_exclude = ".linenos, .gp, .go"

# every other warning fails the build; docutils' own are about markup inside of outputs, as a rule in a poem
suppress_warnings = ["docutils", "misc.highlighting_failure", "myst.header", "mystnb.unknown_mime_type", "mystnb.mime_priority"]
