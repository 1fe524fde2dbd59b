// Shows the answers of a system after each segment. The cells exist already, and text is only inserted as text.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const system = document.getElementById("system");
  const slider = document.getElementById("segment");
  const number = document.getElementById("number");
  const play = document.getElementById("play");
  const state = document.getElementById("state");
  const figures = [...document.querySelectorAll(".board-figure")];
  const cells = figures.map(figure => [...figure.querySelectorAll(".cell")]);
  const captions = figures.map(figure => figure.querySelector("figcaption"));
  let timer = null;

  function show() {
    const answers = data.answers[system.value];
    const segment = Math.min(Number(slider.value), answers.length);
    const trained = data.segments[system.value];
    slider.max = answers.length;
    number.value = segment > trained ? `${segment} (trained with ${trained})` : String(segment);
    state.textContent = `${system.selectedOptions[0].textContent}, after ${segment} segment${segment === 1 ? "" : "s"}.`;
    figures.forEach((figure, place) => {
      const answer = answers[segment - 1][place];
      const before = segment > 1 ? answers[segment - 2][place] : data.puzzles[place];
      let wrong = 0;
      cells[place].forEach((cell, i) => {
        const isWrong = answer[i] !== data.solutions[place][i];
        const isGiven = !data.blanks.includes(data.puzzles[place][i]);
        wrong += isWrong;
        cell.textContent = cell.dataset.symbol = data.symbols[answer[i]];
        cell.classList.toggle("wrong", isWrong);
        cell.classList.toggle("given", !isWrong && isGiven);
        cell.classList.toggle("right", !isWrong && !isGiven);
        cell.classList.toggle("changed", answer[i] !== before[i]);
      });
      const words = wrong === 0 ? "solved" : `${wrong} wrong`;
      captions[place].textContent = `${words}, q ${data.q_halt[system.value][segment - 1][place].toFixed(2)}`;
    });
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  play.addEventListener("click", () => {
    if (timer !== null) {
      stop();
      return;
    }
    if (Number(slider.value) >= Number(slider.max)) slider.value = 1;
    show();
    play.textContent = "Pause";
    timer = setInterval(() => {
      if (Number(slider.value) >= Number(slider.max)) {
        stop();
        return;
      }
      slider.value = Number(slider.value) + 1;
      show();
    }, 500);
  });
  slider.addEventListener("input", () => {
    stop();
    show();
  });
  system.addEventListener("change", () => {
    stop();
    slider.max = data.answers[system.value].length;
    slider.value = data.segments[system.value];
    show();
  });
  document.querySelector(".play").hidden = false;
  show();
})();
