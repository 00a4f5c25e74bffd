"use strict";
(() => {
  const rows = Array.from(document.querySelectorAll(".node"));
  const byId = new Map(rows.map((row) => [row.dataset.id, row]));
  const button = (row) => row.querySelector(":scope > .gutter > .fold");
  const isFolded = (row) => button(row)?.getAttribute("aria-expanded") === "false";

  // Rows stand in pre-order, so one pass downwards knows for every row whether an ancestor hides it.
  const refresh = () => {
    let hiddenBelow = Infinity;
    for (const row of rows) {
      const depth = Number(row.dataset.depth);
      if (depth <= hiddenBelow) hiddenBelow = Infinity;
      row.hidden = depth > hiddenBelow;
      if (!row.hidden && isFolded(row)) hiddenBelow = depth;
    }
  };
  const setFolded = (row, folded) => button(row)?.setAttribute("aria-expanded", String(!folded));

  // A sample's earlier messages are its parent's first ones, and so on upwards.
  const earlierMessages = (row, count) => {
    const pieces = [];
    let current = byId.get(row.dataset.parent);
    while (count > 0 && current) {
      const box = current.querySelector(":scope > details > .messages");
      const shared = Number(box.dataset.shared || 0);
      const own = Array.from(box.querySelectorAll(":scope > .message:not(.shared)"));
      if (count > shared) pieces.unshift(...own.slice(0, count - shared));
      count = Math.min(count, shared);
      current = byId.get(current.dataset.parent);
    }
    return pieces.map((piece) => {
      const copy = piece.cloneNode(true);
      copy.classList.add("shared");
      return copy;
    });
  };

  const showEarlier = (control) => {
    const row = control.closest(".node");
    row.querySelector(":scope > details > .messages").prepend(...earlierMessages(row, Number(control.dataset.count)));
    control.remove();
  };

  document.querySelector(".tree").addEventListener("click", (event) => {
    const target = event.target;
    if (target.matches(".fold")) {
      const row = target.closest(".node");
      setFolded(row, !isFolded(row));
      refresh();
    } else if (target.matches(".earlier")) {
      showEarlier(target);
    }
  });
  const onClick = (id, action) => document.getElementById(id).addEventListener("click", action);
  const eachRow = (action) => () => { rows.forEach(action); refresh(); };
  onClick("fold-all", eachRow((row) => setFolded(row, true)));
  onClick("unfold-all", eachRow((row) => setFolded(row, false)));
  onClick("open-all", eachRow((row) => { row.querySelector("details").open = true; }));
  onClick("close-all", eachRow((row) => { row.querySelector("details").open = false; }));
})();
