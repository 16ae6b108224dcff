"""Take a picture of a page on this disk, such as a run's report, in headless Chromium.

python -m scripts.screenshot runs/my/report.html report.png --width 1280 --height 900
"""

import argparse
import sys
from pathlib import Path

from tests.support.browser import find_chromium, open_browser


def main() -> None:
    """Open the page, take the picture, and print what the browser complains about."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280, help="CSS pixels")
    parser.add_argument("--height", type=int, default=900, help="CSS pixels")
    parser.add_argument("--dark", action="store_true", help="prefer dark colours")
    parser.add_argument("--touch", action="store_true", help="emulate a touch screen")
    parser.add_argument("--whole", action="store_true", help="the whole page, not only what fits")
    parser.add_argument("--part", help="id of the part to scroll to")
    args = parser.parse_args()
    program = find_chromium()
    if program is None:
        sys.exit("no Chromium is installed")
    with open_browser(program) as browser:
        browser.set_screen(args.width, args.height, args.dark, args.touch)
        browser.open(args.page)
        if args.part:
            browser.run(f"document.getElementById({args.part!r}).scrollIntoView()")
        args.picture.write_bytes(browser.picture(args.whole))
        for complaint in browser.complaints:
            print(complaint, file=sys.stderr)


if __name__ == "__main__":
    main()
