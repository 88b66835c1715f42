/** What leaves the viewer, and what comes back. */
export const leaving = {
  Export: "내보내기",
  Close: "닫기",
  Figure: "그림",
  "In vectors, or as pixels at twice the size; with axes, colour bar and how it was taken.":
    "벡터 또는 두 배 크기의 픽셀로 저장합니다. 축, 컬러바, 촬영 조건이 함께 들어갑니다.",
  Ground: "바탕",
  "white, for a paper": "흰색, 논문용",
  "dark, as on the screen": "어둡게, 화면 그대로",
  Picture: "화면 그림",
  "Map over depth": "깊이 지도",
  Data: "데이터",
  "The shown quantity as rows, or the stored tables byte for byte.":
    "보이는 양을 행으로, 또는 저장된 표를 바이트 그대로 내보냅니다.",
  "No scan is shown, or it is not finished.": "보이는 스캔이 없거나 아직 끝나지 않았습니다.",
  Film: "영상",
  "A film needs a scan with several tokens.": "영상을 만들려면 토큰이 여럿인 스캔이 필요합니다.",
  "The tokens as a WebM film, {fps} a second: it takes as long as it lasts.":
    "토큰을 초당 {fps}개씩 WebM 영상으로 만듭니다. 영상 길이만큼 걸립니다.",
  Stop: "중지",
  Page: "페이지",
  "One HTML file with the viewer and these scans in it. It opens from a disk, without a network.":
    "뷰어와 이 스캔들이 들어 있는 HTML 파일 하나. 네트워크 없이 디스크에서 열립니다.",
  "This is a saved page.": "저장된 페이지입니다.",
  "What still runs is not in it.": "아직 실행 중인 스캔은 들어 있지 않습니다.",
  "Open a saved page": "저장한 페이지 열기",
  Recording: "녹화",
  "Records what you look at, step by step, to be played again; a saved page takes it along.":
    "보는 것을 단계별로 녹화해 다시 재생합니다. 저장한 페이지에도 함께 들어갑니다.",
  "{steps} over {time}": "{time} 동안 {steps}",
  "{count} step": "{count}단계",
  "{count} steps": "{count}단계",
  Record: "녹화",
  Play: "재생",
  "Working…": "작업 중…",
  "Saved {name}.": "{name} 저장됨.",
  "State {hash}.": "상태 {hash}.",
  "There is no picture to draw yet.": "아직 그릴 그림이 없습니다.",
  token: "토큰",
  layer: "레이어",
  "This page was saved without it": "이 페이지는 그것 없이 저장되었습니다",
} as const;
